"""How many singular values to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from lora_pipeline.errors import ParamsError

Kind = Literal["rank", "energy", "error", "ratio", "threshold"]


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

    kind: Kind
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


def rank_rule(choice: int | Mapping[str, float] | None) -> RankRule | None:
    """The rule that a value of `params.yaml` asks for.

    Args:
        choice: A rank; or one of the other kinds with its value, such as {"energy": 0.95}, and perhaps `max_rank`;
            None for no rule.

    Raises:
        ParamsError: Not one kind, or a value out of its range.
    """
    if choice is None:
        return None
    if isinstance(choice, int):
        return RankRule("rank", choice)
    kinds = [kind for kind in choice if kind != "max_rank"]
    if len(kinds) != 1 or kinds[0] not in ("energy", "error", "ratio", "threshold"):
        fix = "give one of energy, error, ratio and threshold"
        raise ParamsError("rank", f"{', '.join(kinds) or 'nothing'} is not one rule", fix)
    at_most = int(choice["max_rank"]) if "max_rank" in choice else None
    return RankRule(cast(Kind, kinds[0]), choice[kinds[0]], at_most)
