"""How much an adapter changes, and in how many directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_pipeline.adapters.lora import LoraFactors

ENERGY = 0.99


@dataclass(frozen=True)
class Organ:
    """One layer's change ΔW.

    Args:
        norm: ||ΔW||, the Frobenius norm.
        rank: What the file spends on it.
        needed: How many singular values make up 99 % of their squares' sum; 0 for no change.
        alpha: What the file multiplies by, times `rank`.
    """

    norm: float
    rank: int
    needed: int
    alpha: float


@dataclass(frozen=True)
class Anatomy:
    """An adapter's changes.

    Args:
        norm: The Frobenius norm of all changes together.
        kept: By rank (powers of two), the share of all squares that is left when every layer is cut to that rank.
        layers: By target.
    """

    norm: float
    kept: Mapping[int, float]
    layers: Mapping[str, Organ]


def dissect(factors: Mapping[str, LoraFactors]) -> Anatomy:
    """Measures an adapter from its factors alone; a DoRA is measured as if it were none."""
    energies = {target: singular_values(each).square() for target, each in factors.items()}
    total = sum(float(each.sum()) for each in energies.values())
    ranks = [2**power for power in range(max((len(each) for each in energies.values()), default=0).bit_length())]
    kept = {rank: sum(float(each[:rank].sum()) for each in energies.values()) / total for rank in ranks if total}
    layers = {
        target: Organ(float(each.sum()) ** 0.5, factors[target].rank, _needed(each), factors[target].alpha)
        for target, each in energies.items()
    }
    return Anatomy(total**0.5, kept, layers)


def singular_values(factors: LoraFactors) -> Tensor:
    """All singular values of a change that can be other than 0, largest first, in double: by the QR core."""
    up, down = factors.up.double().flatten(1), factors.down.double().flatten(1)
    _, r_up = torch.linalg.qr(up)
    _, r_down = torch.linalg.qr(down.T)
    values: Tensor = torch.linalg.svdvals(r_up @ r_down.T)
    return values * abs(factors.scale)


def _needed(energies: Tensor) -> int:
    total = float(energies.sum())
    if total == 0.0:
        return 0
    return min(int((energies.cumsum(0) < ENERGY * total).sum()) + 1, len(energies))
