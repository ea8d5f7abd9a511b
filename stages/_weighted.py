"""Adapters on a command line, `a.safetensors=0.7`, and by name in a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_pipeline.errors import UsageError

if TYPE_CHECKING:
    from lora_pipeline.adapters.composition import Part

Weighted = tuple[Path, float]


def parse_weighted(texts: Sequence[str]) -> list[Weighted]:
    """Reads `file=weight` or `file`, whose weight is 1.

    Raises:
        UsageError: A weight that is no finite number.
    """
    return [_parse(text) for text in texts]


def _parse(text: str) -> Weighted:
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(text, f"the weight {number!r} is no number", "write it like zorp.safetensors=0.7")
    return Path(path), weight


def named(folder: Path, weights: Mapping[str, float]) -> list[Weighted]:
    """The files of adapters given by name, in the names' order."""
    return [(folder / f"{name}.safetensors", weight) for name, weight in sorted(weights.items())]


def by_name(weighted: Sequence[Weighted]) -> dict[str, float]:
    return {path.stem: weight for path, weight in weighted}


def load_parts(weighted: Sequence[Weighted]) -> list[Part]:
    """Loads adapters; each is named after its file."""
    from lora_pipeline.adapters import load_adapter

    return [(path.stem, load_adapter(path), weight) for path, weight in weighted]
