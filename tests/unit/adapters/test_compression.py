"""Cutting to a rank, against the singular values of the full change."""

from __future__ import annotations

import pytest
import torch

from lora_pipeline.adapters.compression import truncate
from lora_pipeline.adapters.extraction import squared_norm
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule


@pytest.fixture(params=[(), (3, 3)])
def factors(request: pytest.FixtureRequest, generator: torch.Generator) -> LoraFactors:
    kernel = request.param
    down = torch.randn(6, 10, *kernel, generator=generator)
    up = torch.randn(12, 6, *[1] * len(kernel), generator=generator)
    return LoraFactors(down, up, alpha=-3.0)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_cut_is_the_best_of_its_rank(factors: LoraFactors, rank: int) -> None:
    cut, residual = truncate(factors, RankRule("rank", rank))
    delta = factors.delta().double()
    values = torch.linalg.svdvals(delta.flatten(1))
    best = float(values[rank:].norm() / values.norm())
    measured = float((cut.delta().double() - delta).norm() / delta.norm())
    assert cut.rank == rank
    assert residual == pytest.approx(best, rel=1e-5)
    assert measured == pytest.approx(best, rel=1e-5)


def test_a_rank_there_already_is_changes_nothing(factors: LoraFactors) -> None:
    cut, residual = truncate(factors, RankRule("rank", 6))
    assert cut is factors
    assert residual == 0.0


def test_factors_that_change_nothing_have_no_residual() -> None:
    cut, residual = truncate(LoraFactors(torch.ones(3, 4), torch.zeros(5, 3), 1.0), RankRule("energy", 0.9))
    assert residual == 0.0
    assert not cut.delta().any()


def test_the_norm_needs_no_full_change(factors: LoraFactors) -> None:
    assert squared_norm(factors) == pytest.approx(float(factors.delta().double().norm()) ** 2, rel=1e-5)
