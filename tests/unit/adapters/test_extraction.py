"""An adapter out of another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.extraction import Cut, Extraction, extract
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.errors import CorruptError, UsageError


@pytest.fixture(params=[(), (3, 3)])
def factors(request: pytest.FixtureRequest, generator: torch.Generator) -> LoraFactors:
    kernel = request.param
    down = torch.randn(6, 10, *kernel, generator=generator)
    up = torch.randn(12, 6, *[1] * len(kernel), generator=generator)
    return LoraFactors(down, up, alpha=-3.0)


def test_the_residual_is_the_one_over_all_targets(factors: LoraFactors) -> None:
    small = LoraFactors(torch.eye(4), torch.eye(4), 4.0)
    source = Adapter({"unet.a": factors, "unet.b": small}, provenance={"base": "b", "data": "d"})
    extraction = extract(source, RankRule("rank", 2), {"code": "1"}, base="b")
    before = torch.cat([each.delta().flatten() for each in source.factors.values()])
    after = torch.cat([each.delta().flatten() for each in extraction.adapter.factors.values()])
    assert extraction.residual == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4)
    assert extraction.layers["unet.b"].residual == pytest.approx(0.5**0.5)
    assert extraction.layers["unet.b"].energy == pytest.approx(0.5)
    assert extraction.layers["unet.a"].norm == pytest.approx(float(factors.delta().norm()), rel=1e-5)
    assert extraction.adapter.provenance["residual"] == round(extraction.residual, 6)
    assert extraction.adapter.provenance["data"] == "d"
    assert extraction.adapter.provenance["code"] == "1"


def test_every_layer_gets_the_rank_that_its_own_change_needs(factors: LoraFactors) -> None:
    flat = LoraFactors(torch.eye(4), torch.eye(4), 4.0)
    steep = LoraFactors(torch.diag(torch.tensor([1.0, 0.1, 0.01, 0.001])), torch.eye(4), 4.0)
    source = Adapter({"unet.flat": flat, "unet.steep": steep, "unet.random": factors})
    extraction = extract(source, RankRule("error", 0.2), {})
    assert (extraction.layers["unet.flat"].rank, extraction.layers["unet.steep"].rank) == (4, 1)
    assert all(cut.residual <= 0.2 for cut in extraction.layers.values())


def test_without_a_rule_nothing_is_cut_and_the_tokens_stay(factors: LoraFactors) -> None:
    source = Adapter({"unet.a": factors}, {"<a>": torch.ones(1, 4)}, foreign={"x": torch.ones(1)})
    adapter = extract(source, None, {}, base="b").adapter
    assert adapter.factors["unet.a"] is factors
    assert torch.equal(adapter.embeddings["<a>"], torch.ones(1, 4))
    assert adapter.provenance["base"] == "b"
    assert set(adapter.foreign) == {"x"}


@pytest.mark.parametrize("rule", [None, RankRule("rank", 2)])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 16.0])
def test_another_alpha_is_the_same_change(factors: LoraFactors, rule: RankRule | None, alpha: float) -> None:
    plain = extract(Adapter({"unet.a": factors}), rule, {}).adapter.factors["unet.a"]
    found = extract(Adapter({"unet.a": factors}), rule, {}, alpha=alpha).adapter.factors["unet.a"]
    assert found.alpha == alpha
    assert torch.allclose(found.delta(), plain.delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_not_above_zero_is_refused(factors: LoraFactors, alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        extract(Adapter({"unet.a": factors}), None, {}, alpha=alpha)


def test_an_adapter_of_another_base_is_refused(factors: LoraFactors) -> None:
    with pytest.raises(CorruptError, match="base"):
        extract(Adapter({"unet.a": factors}, provenance={"base": "other"}), None, {}, base="b")


@pytest.mark.parametrize("extra", [{"foreign": {"x": torch.ones(1)}}, {"magnitudes": {"unet.a": torch.ones(12, 1)}}])
def test_what_would_lose_its_meaning_is_not_cut(factors: LoraFactors, extra: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        extract(Adapter({"unet.a": factors}, **extra), RankRule("rank", 2), {})


def test_what_was_left_out_counts_by_its_squares() -> None:
    extraction = Extraction(Adapter({}), {"unet.a": Cut(1, 3.0, 0.5)}, {"unet.a.bias": 4.0})
    assert extraction.left_out_share == pytest.approx(16 / 25)
    assert extraction.residual == pytest.approx(0.5)
