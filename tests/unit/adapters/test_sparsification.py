"""TIES, DARE and pruning by magnitude, against value by value readings of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.recipes import Recipe
from lora_pipeline.adapters.sparsification import Change, dare, generator_for, magnitude, sparsified, ties, trimmed
from lora_pipeline.errors import CorruptError

FULL = RankRule("rank", 10_000)  # as many as the layer has


def largest(values: list[float], density: float) -> list[float]:
    """The oracle of trimming: sorted, and cut off."""
    count = max(1, math.floor(density * len(values) + 0.5))
    kept = sorted(range(len(values)), key=lambda place: -abs(values[place]))[:count]
    return [value if place in kept else 0.0 for place, value in enumerate(values)]


def elected(values: list[float]) -> float:
    """The oracle of TIES for one value of each change: the majority by weight, then the mean of its members."""
    positive, negative = [v for v in values if v > 0], [v for v in values if v < 0]
    winners = positive if sum(positive) > -sum(negative) else negative
    return sum(winners) / len(winners) if winners else 0.0


def drawn_changes(seed: int, count: int, shape: tuple[int, ...]) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source) for _ in range(count)]


CASES = {
    "seed": st.integers(0, 10_000),
    "count": st.integers(1, 4),
    "shape": st.tuples(st.integers(1, 7), st.integers(1, 7)),
    # no halves of a value: there rounding decides
    "density": st.floats(0.01, 1.0).map(lambda density: round(density, 2) - 0.003),
}


@given(**CASES)
def test_ties_is_the_paper_value_by_value(seed: int, count: int, shape: tuple[int, int], density: float) -> None:
    changes = drawn_changes(seed, count, shape)
    kept = [largest(change.flatten().tolist(), density) for change in changes]
    expected = torch.tensor([elected(list(values)) for values in zip(*kept, strict=True)]).reshape(shape)
    torch.testing.assert_close(ties(changes, density), expected, rtol=1e-5, atol=1e-6)


@given(**CASES)
def test_magnitude_is_the_sum_of_the_largest(seed: int, count: int, shape: tuple[int, int], density: float) -> None:
    changes = drawn_changes(seed, count, shape)
    kept = [largest(change.flatten().tolist(), density) for change in changes]
    expected = torch.tensor([sum(values) for values in zip(*kept, strict=True)]).reshape(shape)
    torch.testing.assert_close(magnitude(changes, density), expected, rtol=1e-5, atol=1e-6)


def test_ties_by_hand() -> None:
    one = torch.tensor([3.0, -2.0, 0.1, 4.0, 5.0])
    other = torch.tensor([1.0, 5.0, -4.0, -4.0, 0.2])
    # kept: 3 -2 . 4 5 and 1 5 -4 -4 .; the last but one cancels
    assert ties([one, other], 0.8).tolist() == [2.0, 5.0, -4.0, 0.0, 5.0]


def test_a_negative_weight_votes_for_the_opposite() -> None:
    one, other = torch.tensor([2.0, 2.0]), torch.tensor([3.0, -3.0])
    assert ties([one, other], 1.0).tolist() == [2.5, -3.0]
    assert ties([one, -other], 1.0).tolist() == [-3.0, 2.5]


def test_trimming_keeps_at_least_one_and_all_of_density_one() -> None:
    change = torch.tensor([[0.5, -2.0], [1.0, 0.0]])
    assert trimmed(change, 0.01).tolist() == [[0.0, -2.0], [0.0, 0.0]]
    assert torch.equal(trimmed(change, 1.0), change)
    assert trimmed(torch.tensor([[3.0]]), 0.5).tolist() == [[3.0]]


def test_dare_keeps_whole_values_divided_by_the_density() -> None:
    change = drawn_changes(0, 1, (100, 100))[0]
    kept = dare([change], 0.25, [generator_for(0, "t", "a")])
    there = kept != 0
    torch.testing.assert_close(kept[there], change[there] / 0.25)
    assert float(there.float().mean()) == pytest.approx(0.25, abs=0.02)


def test_dare_is_right_on_average() -> None:
    changes = drawn_changes(1, 2, (6, 5))
    draws = [dare(changes, 0.4, [generator_for(seed, "t", "a"), generator_for(seed, "t", "b")]) for seed in range(4000)]
    mean = torch.stack(draws).double().mean(0)
    # five standard errors of the largest value
    deviation = float(torch.stack(changes).abs().max()) * math.sqrt(2 * (1 / 0.4 - 1) / len(draws))
    assert float((mean - (changes[0] + changes[1])).abs().max()) < 5 * deviation


@pytest.mark.parametrize("other", [(8, "t", "a"), (7, "u", "a"), (7, "t", "b")])
def test_chance_depends_on_seed_layer_and_adapter(other: tuple[int, str, str]) -> None:
    draws = [torch.rand(64, generator=generator_for(*arguments)) for arguments in ((7, "t", "a"), (7, "t", "a"), other)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def factors_of(seed: int, kernel: tuple[int, ...] = ()) -> LoraFactors:
    source = torch.Generator().manual_seed(seed)
    down = torch.randn(2, 6, *kernel, generator=source)
    return LoraFactors(down, torch.randn(8, 2, *[1] * len(kernel), generator=source), alpha=1.5)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("method", ["ties", "dare", "magnitude"])
def test_all_ranks_together_are_the_sparse_sum_itself(method: str, kernel: tuple[int, ...]) -> None:
    changes: list[Change] = [("a", factors_of(1, kernel), 0.7), ("b", factors_of(2, kernel), -1.2)]
    deltas = [factors.delta() * weight for _, factors, weight in changes]
    recipe = Recipe(method, density=0.3, seed=5, rank=FULL)
    expected = {
        "ties": lambda: ties(deltas, 0.3),
        "magnitude": lambda: magnitude(deltas, 0.3),
        "dare": lambda: dare(deltas, 0.3, [generator_for(5, "unet.x", name) for name in "ab"]),
    }[method]()
    factors, kept = sparsified("unet.x", changes, recipe)
    assert factors.rank == (8 if kernel else 6)
    torch.testing.assert_close(factors.delta(), expected, rtol=1e-4, atol=1e-5)
    assert kept.residual < 1e-5


@pytest.mark.parametrize("rank", [None, RankRule("rank", 2), RankRule("error", 0.4), RankRule("energy", 0.7)])
def test_the_residual_is_the_true_one_and_within_its_bound(rank: RankRule | None) -> None:
    changes: list[Change] = [("a", factors_of(1), 0.7), ("b", factors_of(2), -1.2)]
    whole = ties([factors.delta() * weight for _, factors, weight in changes], 0.3)
    factors, kept = sparsified("unet.x", changes, Recipe("ties", density=0.3, rank=rank))
    true = float((factors.delta() - whole).norm() / whole.norm())
    values = torch.linalg.svdvals(whole.double())
    assert true == pytest.approx(kept.residual, rel=1e-4)
    assert true == pytest.approx(float(values[factors.rank :].norm() / values.norm()), rel=1e-4)
    if rank is None:
        assert factors.rank == 4
    elif rank.kind == "error":
        assert true <= 0.4 < float(values[factors.rank - 1 :].norm() / values.norm())
    elif rank.kind == "energy":
        assert true**2 <= 0.3 < float(values[factors.rank - 1 :].norm() / values.norm()) ** 2


def test_layers_of_two_shapes_are_refused_by_name() -> None:
    with pytest.raises(CorruptError, match=r"unet\.x"):
        sparsified(
            "unet.x", [("a", factors_of(1), 1.0), ("b", factors_of(2, (3, 3)), 1.0)], Recipe("ties", density=0.5)
        )
