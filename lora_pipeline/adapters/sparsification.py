"""Sums of changes of which most values are left out, so that adapters stand less in each other's way.

All of them look at the values of the full change: those of the factors mean nothing by themselves, as up · Q and
Q⁻¹ · down are the same change for any Q. The sum has no low rank; its best low-rank product takes its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_pipeline.adapters.lora import LoraFactors, fitted
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.recipes import Recipe
from lora_pipeline.adapters.spectrum import LowRank, low_rank

# An adapter's name, its factors of one layer, and their weight.
Change = tuple[str, LoraFactors, float]
# Values that cancel to this share of their size are rounding, whose sign means nothing.
_ROUNDING = 1e-6


def sparsified(target: str, changes: Sequence[Change], recipe: Recipe) -> tuple[LoraFactors, LowRank]:
    """One layer's changes as one.

    Args:
        target: The layer.
        changes: At least one.
        recipe: Its method is `ties`, `dare` or `magnitude`. Without its `rank` the sum of the ranks is kept.

    Returns:
        The factors, and what they are made of.

    Raises:
        CorruptError: The adapters change weights of different shapes.
    """
    first = changes[0][1]
    shape = (first.up.shape[0], *first.down.shape[1:])
    deltas = [fitted(target, factors, shape).delta().flatten(1) * weight for _, factors, weight in changes]
    density = recipe.density if recipe.density is not None else 1.0
    if recipe.method == "dare":
        generators = [generator_for(recipe.seed, target, name) for name, _, _ in changes]
        whole = dare(deltas, density, generators)
    else:
        whole = {"ties": ties, "magnitude": magnitude}[recipe.method](deltas, density)
    rank = sum(factors.rank for _, factors, _ in changes)
    cut = low_rank(whole, recipe.rank or RankRule("rank", rank))
    up = cut.up.reshape(-1, cut.rank, *first.up.shape[2:])
    return LoraFactors(cut.down.reshape(cut.rank, *shape[1:]), up, alpha=float(cut.rank)), cut


def trimmed(change: Tensor, density: float) -> Tensor:
    """The largest values; zero in place of the others.

    Args:
        change: Of any shape.
        density: The share of values to keep, in (0, 1]; at least one is kept, and so are those as large as the
            smallest that is.
    """
    sizes = change.abs().flatten()
    keep = max(1, round(density * sizes.numel()))
    bound = sizes.kthvalue(sizes.numel() - keep + 1).values
    return torch.where(change.abs() >= bound, change, 0.0)


def magnitude(changes: Sequence[Tensor], density: float) -> Tensor:
    """The sum of the largest values of each."""
    return sum((trimmed(change, density) for change in changes), torch.tensor(0.0))


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """The mean of those that agree with the majority (Yadav et al. 2023, arXiv:2306.01708, algorithm 1).

    Per value: of the largest of each change, the sign of their sum is elected, and the mean is over those that have it;
    zero where they cancel. The changes are weighted already: a negative weight votes for the opposite, a larger one has
    the larger vote. That also stands for the paper's λ.

    Args:
        changes: Weighted, all of one shape.
        density: See `trimmed`.
    """
    kept = [trimmed(change, density) for change in changes]
    votes, sizes = sum(kept, torch.tensor(0.0)), sum((each.abs() for each in kept), torch.tensor(0.0))
    elected = torch.where(votes.abs() > _ROUNDING * sizes, votes.sign(), 0.0)
    total, members = torch.zeros_like(elected), torch.zeros_like(elected)
    for each in kept:
        agrees = each * elected > 0
        total += torch.where(agrees, each, 0.0)
        members += agrees
    return total / members.clamp_min_(1.0)


def dare(changes: Sequence[Tensor], density: float, generators: Sequence[torch.Generator]) -> Tensor:
    """The sum of what chance leaves of each, rescaled to be right on average (Yu et al. 2023, arXiv:2311.03099).

    Args:
        changes: Weighted, all of one shape.
        density: The share of values that is kept, on average; each is divided by it.
        generators: One for each change.
    """
    whole = torch.zeros_like(changes[0])
    for change, generator in zip(changes, generators, strict=True):
        kept = torch.rand(change.shape, generator=generator) < density
        whole += torch.where(kept, change / density, 0.0)
    return whole


def generator_for(seed: int, target: str, name: str) -> torch.Generator:
    """A generator that depends on its three arguments and nothing else."""
    digest = hashlib.sha256(f"{seed}/{target}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
