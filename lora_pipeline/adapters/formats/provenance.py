"""Provenance in a file's text metadata: ours under one key, and beside it what the source file said."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from lora_pipeline.adapters.adapter import Json
from lora_pipeline.errors import CorruptError

KEY = "lora_pipeline"
SOURCE = "source_metadata"


def read_provenance(metadata: Mapping[str, str], own: Collection[str]) -> dict[str, Json]:
    """What a file says about where it comes from.

    Args:
        metadata: The file's.
        own: Keys that the format reads itself; all others become the provenance's `source_metadata`.

    Raises:
        CorruptError: Our key holds no object.
    """
    provenance: dict[str, Json] = read_object(metadata, KEY)
    texts = {key: text for key, text in metadata.items() if key != KEY and key not in own}
    if texts:
        told = provenance.get(SOURCE)
        provenance[SOURCE] = {**(told if isinstance(told, Mapping) else {}), **texts}
    return provenance


def write_provenance(provenance: Mapping[str, Json], own: Collection[str]) -> dict[str, str]:
    """The metadata that `read_provenance` reads back.

    Args:
        provenance: Any JSON.
        own: Keys that the format writes itself; the source's of those names stay under our key.
    """
    source = provenance.get(SOURCE)
    told = source if isinstance(source, Mapping) else {}
    texts = {key: text for key, text in told.items() if isinstance(text, str) and key != KEY and key not in own}
    left = {key: value for key, value in told.items() if key not in texts}
    ours = dict(provenance)
    if texts:
        ours = {**ours, SOURCE: left} if left else {key: value for key, value in ours.items() if key != SOURCE}
    return {**texts, KEY: json.dumps(ours, sort_keys=True, allow_nan=False)}


def read_object(texts: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON object under a key, empty where there is none.

    Raises:
        CorruptError: It is no JSON, no object, or holds a number that is not finite.
    """
    try:
        document = json.loads(texts.get(key, "{}"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptError(key, f"the metadata cannot be read: {error!r:.100}", "get the file again") from None
    if not isinstance(document, dict):
        raise CorruptError(key, "the metadata is not an object", "get the file again")
    return document


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number
