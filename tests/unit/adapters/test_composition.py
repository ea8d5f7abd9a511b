"""Composing: the change of the whole is the weighted sum of the changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.composition import blend, compose, digest
from lora_pipeline.adapters.lora import LoraFactors, concatenated
from lora_pipeline.adapters.recipes import Recipe
from lora_pipeline.errors import CorruptError, ParamsError

Make = Callable[..., Adapter]
WEIGHTS = st.floats(-3, 3, allow_nan=False)


@st.composite
def parts(draw: st.DrawFn) -> list[tuple[LoraFactors, float]]:
    out, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2, 5)]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(1, 6))
        down = torch.randn(rank, width, *kernel, generator=source)
        up = torch.randn(out, rank, *[1] * len(kernel), generator=source)
        drawn.append((LoraFactors(down, up, draw(st.floats(-16, 16))), draw(WEIGHTS)))
    return drawn


@given(parts())
def test_the_change_is_the_weighted_sum_of_the_changes(drawn: list[tuple[LoraFactors, float]]) -> None:
    expected, size = torch.zeros(1, dtype=torch.float64), 0.0
    for factors, weight in drawn:
        up, down = factors.up.double().flatten(1), factors.down.double().flatten(1)
        expected = expected + weight * factors.alpha / factors.rank * (up @ down)
        size += abs(weight * factors.scale) * float((up.abs() @ down.abs()).norm())
    composed = concatenated(drawn)
    assert composed.rank == sum(factors.rank for factors, _ in drawn)
    # relative to what was added up: opposite parts may cancel to any small change
    assert float((composed.delta().double().flatten(1) - expected).norm()) <= 1e-6 * size + 1e-30


def test_an_adapter_and_its_opposite_cancel(make_adapter: Make) -> None:
    adapter = make_adapter(1, tokens=("<a>",))
    composed = compose([("a", adapter, 0.7), ("a", adapter, -0.7)])
    for target, factors in composed.factors.items():
        assert float(factors.delta().abs().max()) <= 1e-6 * float(adapter.factors[target].delta().abs().max())


def test_composing_one_adapter_at_weight_one_changes_nothing(make_adapter: Make) -> None:
    adapter = make_adapter(1, tokens=("<a>",), base="b")
    composed = compose([("a", adapter, 1.0)])
    assert composed.factors.keys() == adapter.factors.keys()
    for target, factors in adapter.factors.items():
        assert torch.equal(composed.factors[target].down, factors.down)
        assert torch.equal(composed.factors[target].up, factors.up)
        assert composed.factors[target].alpha == factors.alpha
    assert torch.equal(composed.embeddings["<a>"], adapter.embeddings["<a>"])
    assert composed.provenance["base"] == "b"


def test_a_target_of_only_one_adapter_keeps_its_own_change(make_adapter: Make) -> None:
    whole = make_adapter(1)
    target = "unet.mid_block.attentions.0.to_q"
    other = Adapter({target: make_adapter(2).factors[target]})
    composed = compose([("whole", whole, 0.5), ("other", other, 2.0)])
    for name in whole.factors.keys() - {target}:
        torch.testing.assert_close(composed.factors[name].delta(), 0.5 * whole.factors[name].delta())


def test_tokens_are_joined_and_never_scaled(make_adapter: Make) -> None:
    first, second = make_adapter(1, tokens=("<a>",)), make_adapter(2, tokens=("<b>",))
    composed = compose([("first", first, 0.1), ("second", second, -1.0)])
    assert torch.equal(composed.embeddings["<a>"], first.embeddings["<a>"])
    assert torch.equal(composed.embeddings["<b>"], second.embeddings["<b>"])


def test_one_token_with_two_meanings_is_refused(make_adapter: Make) -> None:
    with pytest.raises(ParamsError, match="<a>"):
        compose([("first", make_adapter(1, tokens=("<a>",)), 1.0), ("second", make_adapter(2, tokens=("<a>",)), 1.0)])


def test_adapters_of_two_bases_are_refused(make_adapter: Make) -> None:
    with pytest.raises(CorruptError, match="base"):
        compose([("first", make_adapter(1, base="b1"), 1.0), ("second", make_adapter(2, base="b2"), 1.0)])


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_adapters_of_different_architectures_are_named(method: str) -> None:
    wide, narrow = (LoraFactors(torch.ones(1, width), torch.ones(5, 1), 1.0) for width in (8, 6))
    parts = [("one", Adapter({"unet.a": wide}), 1.0), ("two", Adapter({"unet.a": narrow}), 1.0)]
    with pytest.raises(CorruptError, match=r"\(5, 8\) to one, and of \(5, 6\) to two") as refused:
        blend(parts, Recipe(method, density=None if method == "sum" else 0.5))
    assert refused.value.where == "unet.a"


def test_provenance_names_parents_and_weights(make_adapter: Make) -> None:
    first, second = make_adapter(1, base="b"), make_adapter(2, base="b")
    composed = compose([("first", first, 0.9), ("second", second, 0.8)])
    assert composed.provenance == {
        "kind": "blend",
        "base": "b",
        "recipe": {"method": "sum"},
        "parents": [
            {"name": "first", "sha256": digest(first), "weight": 0.9},
            {"name": "second", "sha256": digest(second), "weight": 0.8},
        ],
    }
    assert digest(first) != digest(second)
