"""Adapters on a command line, `a.safetensors=0.7`, and by name in a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_pipeline.errors import UsageError

if TYPE_CHECKING:
    from lora_pipeline.adapters.blocks import BlockWeights
    from lora_pipeline.adapters.composition import Part

Weighted = tuple[Path, float]
T = TypeVar("T")


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
    return Path(path), _number(text, number)


def parse_named(texts: Sequence[str]) -> dict[str, float]:
    """Reads `adapter=number`.

    Raises:
        UsageError: Another form, no finite number, or an adapter twice.
    """
    return _by_adapter(texts, _number)


def parse_blocks(texts: Sequence[str]) -> dict[str, BlockWeights]:
    """Reads `adapter=IN04:0.5,*attn2*:0` or, as a vector, `adapter=1,0,0.5,...`; see `adapters.blocks`.

    Raises:
        UsageError: As `parse_named`.
    """
    return _by_adapter(texts, _blocks)


def _by_adapter(texts: Sequence[str], parse: Callable[[str, str], T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not (name and equals):
            raise UsageError(text, "names no adapter", "write it like zorp=0.5")
        if name in found:
            raise UsageError(text, f"is the second for {name}", "give one for each adapter")
        found[name] = parse(text, value)
    return found


def _blocks(text: str, value: str) -> BlockWeights:
    entries = [entry.rpartition(":") for entry in value.split(",")]
    if not any(colon for _, colon, _ in entries):
        return [_number(text, number) for _, _, number in entries]
    return {key: _number(text, number) for key, _, number in entries}


def _number(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(text, f"{number!r} is no number", "write it like zorp.safetensors=0.7")
    return value


def named(folder: Path, weights: Mapping[str, float]) -> list[Weighted]:
    """The files of adapters given by name, in the names' order."""
    return [(folder / f"{name}.safetensors", weight) for name, weight in sorted(weights.items())]


def by_name(weighted: Sequence[Weighted]) -> dict[str, float]:
    return {path.stem: weight for path, weight in weighted}


def load_parts(weighted: Sequence[Weighted]) -> list[Part]:
    """Loads adapters; each is named after its file."""
    from lora_pipeline.adapters import load_adapter

    return [(path.stem, load_adapter(path), weight) for path, weight in weighted]
