"""Low-rank products of full matrices, against the singular value decomposition."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, yet not exported to type checkers

from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.spectrum import LowRank, low_rank


def power_law(rows: int, columns: int, power: float = 0.7) -> Tensor:
    """A matrix whose i-th singular value is i^-power."""
    generator = torch.Generator().manual_seed(0)
    side = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, side, generator=generator, dtype=torch.float64))
    values = torch.arange(1, side + 1, dtype=torch.float64).pow(-power)
    product: Tensor = (left * values @ right.T).float()
    return product


@cache
def with_values(rows: int, columns: int, power: float) -> tuple[Tensor, Tensor]:
    """Such a matrix and its true singular values."""
    matrix = power_law(rows, columns, power)
    return matrix, torch.linalg.svdvals(matrix.double())


def optimum(values: Tensor, rank: int) -> float:
    return float(values[rank:].norm() / values.norm())


def measured(matrix: Tensor, found: LowRank) -> float:
    return float((matrix.double() - found.up.double() @ found.down.double()).norm() / matrix.double().norm())


@pytest.mark.parametrize("shape", [(200, 200), (120, 300), (300, 120)])
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_random_projections_reach_the_optimum_to_a_thousandth(shape: tuple[int, int], rank: int) -> None:
    matrix, values = with_values(*shape, 0.7)
    found = low_rank(matrix, RankRule("rank", rank))
    assert (found.up.shape, found.down.shape) == ((shape[0], rank), (rank, shape[1]))
    assert measured(matrix, found) <= optimum(values, rank) * 1.001


@pytest.mark.parametrize("shape", [(30, 30), (24, 70), (70, 24), (6000, 5), (1, 9), (9, 1), (1, 1)])
def test_the_gram_matrix_gives_what_a_singular_value_decomposition_gives(shape: tuple[int, int]) -> None:
    matrix = power_law(*shape)
    rank = max(1, min(shape) // 2)
    found = low_rank(matrix, RankRule("rank", rank))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    assert float((found.up.double() @ found.down.double() - best).norm() / best.norm()) < 1e-6


RULES = [
    RankRule("energy", 0.9), RankRule("error", 0.2), RankRule("ratio", 0.2), RankRule("threshold", 0.3),
    RankRule("energy", 0.9, at_most=10), RankRule("error", 0.6, at_most=10), RankRule("ratio", 0.4, at_most=10),
    RankRule("threshold", 0.3, at_most=2),
]  # fmt: skip


# The power law of 0.6 needs all looks there are, that of 1.5 only the first.
@pytest.mark.parametrize("power", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("side", [120, 700])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.at_most}")
def test_every_rule_keeps_what_it_keeps_of_the_true_singular_values(rule: RankRule, side: int, power: float) -> None:
    matrix, values = with_values(side, side + 40, power)
    found = low_rank(matrix, rule)
    rank = rule.choose(values)
    assert abs(found.rank - rank) <= 1  # projections are a little short of the last value's energy
    assert measured(matrix, found) == pytest.approx(optimum(values, found.rank), rel=1e-3)
    if rule.kind == "error" and found.rank != rule.at_most:
        assert measured(matrix, found) <= rule.value


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.floats(-6, 6))
def test_full_rank_is_exact_whatever_the_shape_and_size(rows: int, columns: int, seed: int, magnitude: float) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    assert measured(matrix, low_rank(matrix, RankRule("error", 0.0))) < 1e-6


def test_a_rank_above_that_of_the_matrix_adds_nothing(generator: torch.Generator) -> None:
    matrix = torch.randn(300, 3, generator=generator) @ torch.randn(3, 200, generator=generator)
    found = low_rank(matrix, RankRule("rank", 8))
    assert found.rank == 8
    assert measured(matrix, found) < 1e-6
    assert found.up.isfinite().all()
    assert found.down.isfinite().all()


@pytest.mark.parametrize("shape", [(200, 240), (240, 200), (20, 30)])
def test_the_reported_residual_is_the_one_there_is(shape: tuple[int, int]) -> None:
    matrix = power_law(*shape)
    found = low_rank(matrix, RankRule("rank", 5))
    assert found.residual == pytest.approx(measured(matrix, found), rel=1e-5)
    assert found.energy == pytest.approx(1 - measured(matrix, found) ** 2, rel=1e-5)
    assert found.norm == pytest.approx(float(matrix.double().norm()), rel=1e-6)


def test_the_singular_values_are_split_evenly() -> None:
    found = low_rank(power_law(50, 80), RankRule("rank", 6))
    assert torch.allclose(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-4)


def test_a_matrix_of_zeros_gives_zeros() -> None:
    found = low_rank(torch.zeros(4, 7), RankRule("energy", 0.9))
    assert (found.up.shape, found.down.shape, found.residual) == ((4, 1), (1, 7), 0.0)
    assert not (found.up @ found.down).any()


def test_the_same_matrix_gives_the_same_factors_whatever_the_global_generator() -> None:
    matrix = power_law(200, 220)
    first = low_rank(matrix, RankRule("rank", 4))
    state = torch.default_generator.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        again = low_rank(matrix, RankRule("rank", 4))
    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
    assert torch.equal(state, torch.default_generator.get_state())


def test_where_eigenvalues_do_not_converge_the_decomposition_itself_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = power_law(20, 30)
    expected = low_rank(matrix, RankRule("error", 0.3))

    def failing(_gram: Tensor) -> None:
        raise LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = low_rank(matrix, RankRule("error", 0.3))
    assert torch.allclose(found.up @ found.down, expected.up @ expected.down, atol=1e-5)


def test_half_precision_is_decomposed_in_single() -> None:
    matrix = power_law(40, 30).half()
    found = low_rank(matrix, RankRule("rank", 30))
    assert measured(matrix, found) < 1e-6
