"""Which noise levels a phase learns from: a window of the schedule's steps, and how often each of them is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_pipeline.errors import ParamsError
from lora_pipeline.training.draws import spread_places


@dataclass(frozen=True)
class Levels:
    """The steps `first` up to, without it, `last`, of `total`.

    Args:
        first: The least noisy.
        last: Above `first`, at most `total`.
        total: Of the whole schedule.
        logit_normal: Draw the middle of the schedule more often; else each step as often as another.
    """

    first: int
    last: int
    total: int
    logit_normal: bool

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) int64: each by the distribution, together evenly spread over it, see `spread_places`.

        Logit-normal is sigmoid(N(0, 1)) of the schedule's length (Esser et al. 2024, arXiv:2403.03206, section 3.1),
        given that it falls into the window.
        """
        places = spread_places(count, generator)
        if self.logit_normal:
            low, high = _share_below(self.first / self.total), _share_below(self.last / self.total)
            steps = (_quantile(low + places * (high - low)) * self.total).long()
        else:
            steps = self.first + (places * (self.last - self.first)).long()
        return steps.clamp(self.first, self.last - 1)


def levels_of(window: Sequence[float], total: int, logit_normal: bool, where: str) -> Levels:
    """The steps of a window; windows that share an edge share no step.

    Args:
        window: [from, to], shares of the schedule in [0, 1].
        total: How many steps the schedule has.
        logit_normal: See `Levels`.
        where: The window's key, for the error.

    Raises:
        ParamsError: The window is so narrow that no step is within it.
    """
    first, last = (round(share * total) for share in window)
    if first >= last:
        problem = f"{list(window)} holds none of the base's {total} noise levels"
        raise ParamsError(where, problem, f"let the two be at least {1 / total:.1g} apart")
    return Levels(first, last, total, logit_normal)


def _share_below(place: float) -> Tensor:
    """How much of the logit-normal distribution lies below `place` in [0, 1]."""
    below: Tensor = torch.special.ndtr(torch.logit(torch.tensor(place, dtype=torch.float64)))
    return below


def _quantile(shares: Tensor) -> Tensor:
    places: Tensor = torch.special.ndtri(shares).sigmoid()
    return places
