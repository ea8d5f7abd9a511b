"""How strongly an adapter acts, over the denoising of a picture and over the layers of a base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lora_pipeline.adapters.blocks import BlockWeights

# How far the way from one knot to the next is gone, by the share of the progress between them.
BETWEEN: Mapping[str, Callable[[float], float]] = {
    "hold": lambda share: float(share >= 1.0),
    "linear": lambda share: share,
    "cosine": lambda share: (1.0 - math.cos(math.pi * share)) / 2.0,
}


@dataclass(frozen=True)
class WeightSchedule:
    """A weight over progress, from knot to knot, constant before the first and after the last.

    Args:
        knots: (progress, weight), at least one, progress rising.
        between: One of `BETWEEN`: `hold` stays at a knot's weight until the next, `linear` leads straight there,
            `cosine` with a soft start and end.
        window: (start, end) of progress; outside it the weight is 0.
        blocks: Factors by block or layer, see `adapters.blocks.block_factors`.
    """

    knots: tuple[tuple[float, float], ...]
    between: str = "linear"
    window: tuple[float, float] = (0.0, 1.0)
    blocks: BlockWeights = field(default_factory=dict)

    def at(self, progress: float) -> float:
        """The weight at `progress`, in [0, 1]: 0 is the first denoising step, 1 the last."""
        if not self.window[0] <= progress <= self.window[1]:
            return 0.0
        if progress <= self.knots[0][0]:
            return self.knots[0][1]
        for (start, before), (stop, after) in pairwise(self.knots):
            if progress <= stop:
                share = BETWEEN[self.between]((progress - start) / (stop - start))
                return before * (1.0 - share) + after * share  # exact at both knots
        return self.knots[-1][1]


def schedule(weight: float | Sequence[tuple[float, float]], **options: object) -> WeightSchedule:
    """A number is a constant; anything else are knots. The options are those of `WeightSchedule`."""
    knots = ((0.0, float(weight)),) if isinstance(weight, int | float) else tuple(weight)
    return WeightSchedule(knots, **options)  # type: ignore[arg-type]  # checked where they are read


def progresses(steps: int) -> list[float]:
    """The progress of each step: 0 at the first, 1 at the last."""
    return [index / max(1, steps - 1) for index in range(steps)]
