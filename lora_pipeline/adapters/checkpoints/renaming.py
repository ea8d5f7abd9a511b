"""Two vocabularies for the same layers, as pairs of what names begin with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Pairs = list[tuple[str, str]]


def renamed(name: str, beginnings: Mapping[str, str]) -> str | None:
    """The name with its longest known beginning replaced; None where none is known.

    Args:
        name: Dotted, as `down_blocks.0.resnets.1.conv1.weight`.
        beginnings: Whole dotted beginnings, each with its last dot, by those of the other vocabulary.
    """
    end = name.rfind(".")
    while end > 0:
        if (found := beginnings.get(name[: end + 1])) is not None:
            return found + name[end + 1 :]
        end = name.rfind(".", 0, end)
    return None


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group matches at a name's beginning; 0 without a match."""
    expression = re.compile(pattern)
    numbers = [int(match[1]) for name in names if (match := expression.match(name))]
    return max(numbers, default=-1) + 1
