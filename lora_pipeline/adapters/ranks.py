"""How many singular values to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lora_pipeline.errors import ParamsError


@dataclass(frozen=True)
class RankRule:
    """A bound on the rank, or on what is lost.

    Args:
        kind: `rank`: that many. `energy`: the fewest whose squares make up this share of all squares, in (0, 1].
            `error`: the fewest that leave a relative Frobenius error of at most this, in [0, 1). `ratio`: those above
            this share of the largest, in (0, 1). `threshold`: those above this value.
        value: See `kind`.
        at_most: No more than this many, whatever the kind; None for no bound.

    Raises:
        ParamsError: A value out of its range.
    """

    kind: Literal["rank", "energy", "error", "ratio", "threshold"]
    value: float
    at_most: int | None = None

    def __post_init__(self) -> None:
        fits = {
            "rank": self.value >= 1 and float(self.value).is_integer(),
            "energy": 0 < self.value <= 1,
            "error": 0 <= self.value < 1,
            "ratio": 0 < self.value < 1,
            "threshold": 0 <= self.value < float("inf"),
        }
        if not fits[self.kind]:
            ranges = {"rank": "a whole number from 1", "energy": "above 0, up to 1", "error": "from 0, below 1"}
            allowed = {**ranges, "ratio": "above 0, below 1", "threshold": "from 0"}[self.kind]
            raise ParamsError(self.kind, f"{self.value:g} is out of range", f"use {allowed}")
        if self.at_most is not None and self.at_most < 1:
            raise ParamsError("at_most", f"{self.at_most} is below 1", "use 1 or more, or leave it out")

    def choose(self, values: Tensor, total: float | None = None) -> int:
        """How many to keep.

        Args:
            values: Singular values, largest first; not necessarily all of them.
            total: The sum of the squares of all of them, where `values` are not all.

        Returns:
            At least 1, at most as many as there are; 0 where all values are 0.
        """
        values = values.double()
        energies = values.square().cumsum(0)
        whole = total if total is not None else float(energies[-1])
        if whole <= 0.0:
            return 0
        if self.kind == "rank":
            count = int(self.value)
        elif self.kind in ("energy", "error"):
            share = self.value if self.kind == "energy" else 1.0 - self.value**2
            # rounding must not ask for one value more where all of them make up the whole
            count = int((energies < share * whole * (1 - 1e-12)).sum()) + 1
        else:
            bound = self.value * float(values[0]) if self.kind == "ratio" else self.value
            count = int((values > bound).sum())
        return max(1, min(count, len(values), self.at_most or len(values)))
