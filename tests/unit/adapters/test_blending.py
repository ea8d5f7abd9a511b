"""Blends by recipes: what every method must keep to, whatever the factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.composition import Part, blend, compose, digest
from lora_pipeline.adapters.extraction import residual
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.recipes import Recipe
from lora_pipeline.errors import CorruptError, ParamsError

Make = Callable[..., Adapter]
TARGETS = ["unet.conv_in", "unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"]
FULL = RankRule("rank", 10_000)
RECIPES = [
    Recipe(),
    Recipe("interpolate", at=0.3),
    Recipe("ties", density=0.4, rank=FULL),
    Recipe("dare", density=0.4, seed=1, rank=FULL),
    Recipe("magnitude", density=0.4, rank=FULL),
    Recipe(rank=RankRule("rank", 2)),
    Recipe("ties", density=0.4),
]


@st.composite
def drawn_parts(draw: st.DrawFn) -> list[Part]:
    """Adapters of the same layers, of which each may lack some; a 1 x 1 convolution is a linear layer to some."""
    source = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shapes = [
        (draw(st.integers(1, 7)), draw(st.integers(1, 7)), *draw(st.sampled_from([(), (1, 1), (3, 3)])))
        for _ in TARGETS
    ]
    parts: list[Part] = []
    for name in "abc"[: draw(st.integers(1, 3))]:
        factors = {}
        for target, (out, width, *kernel) in zip(TARGETS, shapes, strict=True):
            if kernel == [1, 1] and draw(st.booleans()):
                kernel = []
            rank = draw(st.integers(1, 5))
            down = torch.randn(rank, width, *kernel, generator=source)
            up = torch.randn(out, rank, *[1] * len(kernel), generator=source)
            if draw(st.integers(0, 4)):
                factors[target] = LoraFactors(down, up, draw(st.floats(-16, 16)))
        parts.append((name, Adapter(factors), draw(st.floats(-3, 3))))
    return parts


def delta_of(adapter: Adapter, target: str) -> Tensor:
    """(out, in ...) double; nothing where the adapter leaves the layer alone."""
    return adapter.factors[target].delta().double().flatten(1) if target in adapter.factors else torch.zeros(1)


def regauged(factors: LoraFactors, seed: int) -> LoraFactors:
    """The same change by other factors: up · Q and Q⁻¹ · down, with a well-conditioned Q."""
    source = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(factors.rank, factors.rank, generator=source, dtype=torch.float64))
    turn = turn * torch.logspace(-1, 1, factors.rank, dtype=torch.float64)
    up = (factors.up.double().flatten(1) @ turn).reshape(factors.up.shape)
    down = (torch.linalg.inv(turn) @ factors.down.double().flatten(1)).reshape(factors.down.shape)
    return LoraFactors(down, up, factors.alpha)


@given(drawn_parts())
def test_the_change_of_a_sum_is_the_weighted_sum_of_the_changes(parts: list[Part]) -> None:
    composed = compose(parts)
    for target in TARGETS:
        changes = [weight * delta_of(adapter, target) for _, adapter, weight in parts if target in adapter.factors]
        size = sum((float(change.norm()) for change in changes), 0.0)
        expected = sum(changes, torch.zeros(1, dtype=torch.float64))
        # to the rounding of the factors' own products, which may cancel; and nothing below float32's range counts
        bound = 1e-6 * max(size, sum(product_size(a.factors[target], w) for _, a, w in parts if target in a.factors))
        assert float((delta_of(composed, target) - expected).norm()) <= bound + 1e-30


def product_size(factors: LoraFactors, weight: float) -> float:
    up, down = factors.up.double().flatten(1), factors.down.double().flatten(1)
    return abs(weight * factors.scale) * float((up.abs() @ down.abs()).norm())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.method} {recipe.rank and recipe.rank.value}")
@pytest.mark.parametrize("seed", range(5))
def test_other_factors_of_the_same_changes_change_nothing(recipe: Recipe, seed: int, make_adapter: Make) -> None:
    parts = [("a", make_adapter(seed), 0.7), ("b", make_adapter(seed + 10), -1.2)]
    others = [
        (name, Adapter({t: regauged(f, seed + i) for i, (t, f) in enumerate(adapter.factors.items())}), weight)
        for name, adapter, weight in parts
    ]
    blended, again = blend(parts, recipe), blend(others, recipe)
    for target in blended.layers:
        one, other = delta_of(blended.adapter, target), delta_of(again.adapter, target)
        assert float((one - other).norm()) <= 1e-4 * float(one.norm())
        assert again.layers[target].residual == pytest.approx(blended.layers[target].residual, abs=1e-4)


@pytest.mark.parametrize("method", ["sum", "ties", "magnitude"])
def test_an_adapter_and_its_opposite_leave_nothing(method: str, make_adapter: Make) -> None:
    adapter = make_adapter(1)
    density = None if method == "sum" else 0.5
    composed = blend([("a", adapter, 0.7), ("b", adapter, -0.7)], Recipe(method, density=density)).adapter
    for target, factors in composed.factors.items():
        assert float(factors.delta().abs().max()) <= 1e-6 * float(adapter.factors[target].delta().abs().max())


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("interpolate", at=0.0)], ids=lambda recipe: recipe.method)
def test_one_adapter_at_weight_one_is_itself(recipe: Recipe, make_adapter: Make) -> None:
    adapter = make_adapter(1)
    composed = blend([("a", adapter, 1.0)], recipe).adapter
    assert composed.factors.keys() == adapter.factors.keys()
    for target, factors in adapter.factors.items():
        assert torch.equal(composed.factors[target].down, factors.down)
        assert torch.equal(composed.factors[target].up, factors.up)
        assert composed.factors[target].alpha == factors.alpha


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude"])
def test_one_adapter_of_which_all_values_are_kept_is_itself_to_rounding(method: str, make_adapter: Make) -> None:
    adapter = make_adapter(1)
    composed = blend([("a", adapter, 1.0)], Recipe(method, density=1.0)).adapter
    for target, factors in adapter.factors.items():
        assert composed.factors[target].rank == min(factors.rank, 8)
        torch.testing.assert_close(composed.factors[target].delta(), factors.delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("at", "end"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_a_path_leads_through_the_adapters_themselves(at: float, end: int, make_adapter: Make) -> None:
    parts = [(name, make_adapter(index), 1.0) for index, name in enumerate("abc")]
    there = blend(parts, Recipe("interpolate", at=at)).adapter
    adapter = parts[end][1]
    assert there.factors.keys() == adapter.factors.keys()
    for target, factors in adapter.factors.items():
        assert torch.equal(there.factors[target].down, factors.down)
        assert torch.equal(there.factors[target].up, factors.up)
        assert there.factors[target].alpha == factors.alpha


def test_between_two_adapters_the_change_is_linear(make_adapter: Make) -> None:
    first, second = make_adapter(1), make_adapter(2)
    between = blend([("a", first, 1.0), ("b", second, 2.0)], Recipe("interpolate", at=0.25)).adapter
    for target in first.factors:
        expected = 0.75 * first.factors[target].delta() + 0.25 * 2.0 * second.factors[target].delta()
        torch.testing.assert_close(between.factors[target].delta(), expected, rtol=1e-4, atol=1e-5)


def test_weight_zero_leaves_no_dead_ranks_and_all_tokens(make_adapter: Make) -> None:
    first, second = make_adapter(1, tokens=("<a>",)), make_adapter(2, tokens=("<b>",))
    composed = compose([("a", first, 1.0), ("b", second, 0.0)])
    for target, factors in first.factors.items():
        assert composed.factors[target].rank == factors.rank
    assert composed.embeddings.keys() == {"<a>", "<b>"}
    assert compose([("b", second, 0.0)]).factors == {}


def test_weights_of_text_encoder_and_blocks_reach_their_layers(make_adapter: Make) -> None:
    first, second = make_adapter(1), make_adapter(2)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    attention, resnet = "unet.mid_block.attentions.0.to_q", "unet.mid_block.resnets.0.conv1"
    recipe = Recipe(text_encoder_weights={"a": 0.5}, block_weights={"a": {"*resnets*": 0.0}, "b": {"BASE": 3.0}})
    composed = blend([("a", first, 2.0), ("b", second, 1.0)], recipe).adapter
    changes = {target: (first.factors[target].delta(), second.factors[target].delta()) for target in first.factors}
    for target, (a, b) in {text: (0.5, 3.0), attention: (2.0, 1.0), resnet: (0.0, 1.0)}.items():
        expected = a * changes[target][0] + b * changes[target][1]
        torch.testing.assert_close(composed.factors[target].delta(), expected, rtol=1e-4, atol=1e-5)
    assert composed.factors[resnet].rank == second.factors[resnet].rank


@given(drawn_parts(), st.sampled_from([RankRule("rank", 2), RankRule("error", 0.3), RankRule("energy", 0.8)]))
def test_the_residual_of_a_cut_is_the_true_one_and_within_its_bound(parts: list[Part], rule: RankRule) -> None:
    parts = [(name, adapter, weight) for name, adapter, weight in parts if abs(weight) > 0.1]
    whole, cut = compose(parts), blend(parts, Recipe(rank=rule))
    lost, total = 0.0, 0.0
    for target, layer in cut.layers.items():
        before, after = delta_of(whole, target), delta_of(cut.adapter, target)
        size, error = float(before.norm()), float((before - after).norm())
        if size < 1e-3:
            continue
        assert error == pytest.approx(layer.residual * size, rel=1e-3, abs=1e-4 * size)
        assert layer.norm == pytest.approx(size, rel=1e-3)
        lost, total = lost + error**2, total + size**2
        if rule.kind == "rank":
            assert layer.rank <= 2
        else:
            bound = rule.value if rule.kind == "error" else (1 - rule.value) ** 0.5
            assert error <= (bound + 1e-4) * size
    if total > 1e-3:
        assert residual(cut.layers) == pytest.approx((lost / total) ** 0.5, rel=1e-2, abs=1e-3)


def test_layers_of_one_value_are_layers() -> None:
    one = Adapter({"unet.conv_in": LoraFactors(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 1.0)})
    other = Adapter({"unet.conv_in": LoraFactors(torch.tensor([[[[1.0]]]]), torch.tensor([[[[-1.0]]]]), 0.5)})
    parts = [("a", one, 1.0), ("b", other, 2.0)]
    for recipe, expected in (
        (Recipe(), 5.0),
        (Recipe(rank=RankRule("rank", 1)), 5.0),
        (Recipe("magnitude", density=0.1), 5.0),
        (Recipe("ties", density=0.1), 6.0),
    ):
        delta = blend(parts, recipe).adapter.factors["unet.conv_in"].delta()
        assert float(delta.flatten()) == pytest.approx(expected)


def test_chance_is_the_seeds_alone(make_adapter: Make) -> None:
    parts = [("a", make_adapter(1), 1.0), ("b", make_adapter(2), 1.0)]
    seven, again, eight = (blend(parts, Recipe("dare", density=0.5, seed=seed)).adapter for seed in (7, 7, 8))
    assert digest(seven) == digest(again)
    assert digest(seven) != digest(eight)


def test_provenance_tells_the_whole_recipe(make_adapter: Make) -> None:
    first, second = make_adapter(1, tokens=("<a>",), base="b"), make_adapter(2, tokens=("<a>",), base="b")
    recipe = Recipe(
        "dare", density=0.5, seed=3, text_encoder_weights={"y": 0.0}, block_weights={"x": {"M00": 0.5}},
        rank=RankRule("rank", 1), rename_tokens=True,
    )  # fmt: skip
    composition = blend([("x", first, 0.9), ("y", second, 0.8)], recipe)
    assert composition.adapter.provenance == {
        "kind": "blend",
        "base": "b",
        "recipe": {"method": "dare", "density": 0.5, "seed": 3, "rank": {"rank": 1}},
        "residual": composition.residual,
        "parents": [
            {"name": "x", "sha256": digest(first), "weight": 0.9, "block_weights": {"M00": 0.5}},
            {
                "name": "y", "sha256": digest(second), "weight": 0.8, "text_encoder_weight": 0.0,
                "tokens": {"<a>": "<a-2>"},
            },
        ],
    }  # fmt: skip
    assert composition.residual == pytest.approx(residual(composition.layers), abs=1e-6) != 0.0
    assert composition.renamed == [{}, {"<a>": "<a-2>"}]


@pytest.mark.parametrize("field", ["magnitudes", "foreign"])
def test_what_would_be_lost_is_refused(field: str, make_adapter: Make) -> None:
    target = next(iter(make_adapter(1).factors))
    held: dict[str, Any] = {field: {target: torch.ones(6, 1)}}
    with pytest.raises(CorruptError, match="a: "):
        compose([("a", Adapter(make_adapter(1).factors, **held), 1.0)])


def test_blocks_that_are_nobodys_are_refused(make_adapter: Make) -> None:
    with pytest.raises(ParamsError, match=r"block_weights\.a"):
        blend([("a", make_adapter(1), 1.0)], Recipe(block_weights={"a": [1.0] * 5}))


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("ties", density=0.5)], ids=lambda recipe: recipe.method)
@pytest.mark.parametrize("others", [0, 1])
def test_weights_beyond_float32_are_refused(recipe: Recipe, others: int, make_adapter: Make) -> None:
    parts = [("a", make_adapter(1), 1e39), *([("b", make_adapter(2), 1.0)] * others)]
    with pytest.raises(ParamsError, match="float32"):
        blend(parts, recipe)
