"""Which pictures a step sees: every batch has one shape, every picture comes equally often, and any step is reachable.

Buckets take turns in proportion to their pictures, so that all their batches can be whole: in a cycle of as many steps
as there are pictures (divided by what the buckets' sizes have in common) a bucket has a step for each of its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch

from lora_pipeline.training.draws import batch_indices, generator_for


class Order:
    """Draws the pictures of any step; the same step always gives the same.

    Args:
        shapes: Of each picture; those of one shape make a bucket.
        repeats: How often each picture comes where one with 1 comes once.
        batch_size: Pictures a step. A bucket with fewer shows them more than once, with other noise.
        seed: With phase and purpose it decides everything.
        phase: The phase's name.
        purpose: Such as `instances`.
    """

    def __init__(
        self, shapes: Sequence[Hashable], repeats: Sequence[int], batch_size: int, seed: int, phase: str, purpose: str
    ) -> None:
        self.buckets: dict[Hashable, list[int]] = {}
        for index, (shape, times) in enumerate(zip(shapes, repeats, strict=True)):
            self.buckets.setdefault(shape, []).extend([index] * times)
        self.batch_size = batch_size
        self.seed, self.phase, self.purpose = seed, phase, purpose
        common = math.gcd(*map(len, self.buckets.values()))
        self.shares = {shape: len(places) // common for shape, places in self.buckets.items()}
        self.turns = [shape for shape, share in self.shares.items() for _ in range(share)]

    def pictures(self, step: int) -> list[int]:
        """`batch_size` places in the pool, all of one shape."""
        shape, own_step = self._turn(step)
        places = self.buckets[shape]
        purpose = self.purpose if len(self.buckets) == 1 else f"{self.purpose} of {shape}"
        drawn = batch_indices(len(places), self.batch_size, own_step, self.seed, self.phase, purpose)
        return [places[index] for index in drawn]

    def _turn(self, step: int) -> tuple[Hashable, int]:
        """Whose turn it is, and how many turns it had before."""
        if len(self.buckets) == 1:
            return self.turns[0], step
        cycle, place = divmod(step, len(self.turns))
        generator = generator_for(self.seed, self.phase, cycle, f"{self.purpose} turns")
        order = torch.randperm(len(self.turns), generator=generator).tolist()
        turns = [self.turns[index] for index in order[: place + 1]]
        return turns[-1], cycle * self.shares[turns[-1]] + turns.count(turns[-1]) - 1
