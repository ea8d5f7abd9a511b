"""How strongly an adapter acts, over the denoising of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from lora_pipeline.injection.inject import set_weights


@dataclass(frozen=True)
class WeightSchedule:
    """A weight over progress: linear between knots, constant before the first and after the last.

    Args:
        knots: (progress, weight), at least one, progress rising.
    """

    knots: tuple[tuple[float, float], ...]

    def at(self, progress: float) -> float:
        """The weight at `progress`, in [0, 1]: 0 is the first denoising step, 1 the last."""
        if progress <= self.knots[0][0]:
            return self.knots[0][1]
        for (start, before), (stop, after) in pairwise(self.knots):
            if progress <= stop:
                share = (progress - start) / (stop - start)
                return before * (1.0 - share) + after * share  # exact at both knots
        return self.knots[-1][1]


def schedule(weight: float | Sequence[tuple[float, float]]) -> WeightSchedule:
    """A number is a constant; anything else are knots."""
    return WeightSchedule(((0.0, float(weight)),) if isinstance(weight, int | float) else tuple(weight))


class ScheduledWeights:
    """Keeps the weights of injected adapters at what their schedules say; to be called with the progress.

    Args:
        models: The UNet and the text encoders.
        schedules: By the name an adapter was injected under.
    """

    def __init__(self, models: Sequence[nn.Module], schedules: Mapping[str, WeightSchedule]) -> None:
        self._models = models
        self._schedules = schedules
        self._current: dict[str, float] | None = None

    def __call__(self, progress: float) -> None:
        """Sets the weights for `progress`, in [0, 1]."""
        weights = {name: each.at(progress) for name, each in self._schedules.items()}
        if weights != self._current:
            for model in self._models:
                set_weights(model, weights)
            self._current = weights
