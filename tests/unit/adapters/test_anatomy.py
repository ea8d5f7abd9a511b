"""What changes measure, against the singular values of the full matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.anatomy import dissect, singular_values
from lora_pipeline.adapters.lora import LoraFactors


def test_norms_and_shares_are_those_of_the_full_changes(make_adapter: Callable[..., Adapter]) -> None:
    adapter = make_adapter(3)
    deltas = {target: factors.delta().double().flatten(1) for target, factors in adapter.factors.items()}
    anatomy = dissect(adapter.factors)
    values = {target: torch.linalg.svdvals(delta) for target, delta in deltas.items()}
    whole = sum(float(delta.norm()) ** 2 for delta in deltas.values())
    assert anatomy.norm == pytest.approx(whole**0.5, rel=1e-6)
    assert anatomy.kept.keys() == {1, 2}
    for rank, share in anatomy.kept.items():
        left = sum(float(each[:rank].square().sum()) for each in values.values())
        assert share == pytest.approx(left / whole, rel=1e-6)
    for target, organ in anatomy.layers.items():
        assert organ.norm == pytest.approx(float(deltas[target].norm()), rel=1e-6)
        assert organ.rank == adapter.factors[target].rank
        assert organ.alpha == adapter.factors[target].alpha


def test_the_needed_rank_is_that_of_the_change_not_of_the_file(generator: torch.Generator) -> None:
    down = torch.randn(1, 9, generator=generator).repeat(4, 1)
    factors = LoraFactors(down, torch.randn(7, 4, generator=generator), -4.0)
    organ = dissect({"unet.a": factors}).layers["unet.a"]
    assert (organ.rank, organ.needed) == (4, 1)


@pytest.mark.parametrize("rank", [2, 12])
def test_singular_values_are_those_of_the_change(generator: torch.Generator, rank: int) -> None:
    factors = LoraFactors(torch.randn(rank, 5, generator=generator), torch.randn(7, rank, generator=generator), -3.0)
    expected = torch.linalg.svdvals(factors.delta().double())[: min(rank, 5)]
    torch.testing.assert_close(singular_values(factors), expected, rtol=1e-5, atol=1e-6)


def test_no_change_needs_nothing() -> None:
    anatomy = dissect({"unet.a": LoraFactors(torch.ones(2, 3), torch.zeros(4, 2), 1.0)})
    assert anatomy.norm == 0.0
    assert anatomy.kept == {}
    assert anatomy.layers["unet.a"].needed == 0
    assert dissect({}).layers == {}
