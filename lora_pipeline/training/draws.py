"""Randomness that is counted, not streamed: a killed run has no generator state to lose."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_for(seed: int, phase: str, step: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on its four arguments and nothing else."""
    digest = hashlib.sha256(f"{seed}/{phase}/{step}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def batch_indices(count: int, batch_size: int, step: int, seed: int, phase: str, purpose: str) -> list[int]:
    """Which examples step `step` sees: every epoch is a new permutation, and batches run on across epochs.

    Args:
        count: How many examples there are.
        batch_size: How many of them a step sees; may be more than there are.
        step: From 0.
        seed: With phase and purpose it decides the permutations.
        phase: The phase's name.
        purpose: Such as `instances`.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    epochs = {place // count for place in places}
    orders = {
        epoch: torch.randperm(count, generator=generator_for(seed, phase, epoch, f"{purpose} order"))
        for epoch in epochs
    }
    return [int(orders[place // count][place % count]) for place in places]


def spread_places(count: int, generator: torch.Generator) -> Tensor:
    """(count,) float64 in [0, 1): each uniform, together evenly spread, which steadies the loss.

    Kingma et al. 2021, arXiv:2107.00630, appendix I.1.
    """
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    return (offset + torch.arange(count, dtype=torch.float64) / count) % 1.0
