"""The kinds of values that params.yaml has."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

# Without dots: to DVC `concepts.v1.5` is the key 5 of v1.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("a name is letters, digits, '-' and '_', and starts with a letter or digit")
    return value


def _relative(value: str) -> str:
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise ValueError("a path inside the project, without '..'")
    return value


def _number(value: Any) -> Any:
    """A whole number is a fine float; a boolean is not."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _sorted_knots(knots: list[tuple[float, float]]) -> list[tuple[float, float]]:
    places = [place for place, _ in knots]
    if places != sorted(set(places)) or not all(0 <= place <= 1 for place in places):
        raise ValueError("knots are [progress, weight] with progress rising from 0 to 1")
    return knots


def _window(window: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= window[0] <= window[1] <= 1:
        raise ValueError("a window is [start, end] of progress, both from 0 to 1")
    return window


def _one_rule(rule: dict[str, float]) -> dict[str, float]:
    kinds = sorted(set(rule) - {"max_rank"})
    if len(kinds) != 1 or kinds[0] not in ("energy", "error", "ratio", "threshold"):
        raise ValueError("one of energy, error, ratio and threshold with its value, and perhaps max_rank")
    if not 0 < rule[kinds[0]] < (math.inf if kinds[0] == "threshold" else 1):
        raise ValueError(f"{kinds[0]} is above 0{'' if kinds[0] == 'threshold' else ' and below 1'}")
    if rule.get("max_rank", 1) < 1 or not rule.get("max_rank", 1.0).is_integer():
        raise ValueError("max_rank is a whole number from 1")
    return rule


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(_name)]
RelativePath = Annotated[str, Field(min_length=1), AfterValidator(_relative)]
# How much of a layer's change to keep: a rank, or the fewest that leave a bounded loss, see adapters/ranks.py.
RankChoice = AtLeastOne | Annotated[dict[str, Float], AfterValidator(_one_rule)]
# YAML has lists where Python would have tuples.
Knot = Annotated[tuple[Float, Float], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Knots = Annotated[list[Knot], Field(min_length=1), AfterValidator(_sorted_knots)]
# Of progress: from 0, the first denoising step, to 1, the last.
Window = Annotated[Knot, AfterValidator(_window)]


class Section(BaseModel):
    """A section of the file: frozen, of exact types, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
