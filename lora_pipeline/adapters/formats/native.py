"""The native format, version 1.

Tensors: `<target>.down`, `<target>.up` and `embedding.<token>`, in the dtype they were trained in; `foreign.<name>` for
those that another format's file held and nobody here understands.
Metadata: one key, `lora_pipeline`, holding sorted JSON::

    {"alphas": {target: alpha}, "format": 1, "provenance": {...}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import CorruptError

NAME = "native"
METADATA_KEY = "lora_pipeline"
VERSION = 1
_EMBEDDING = "embedding."
_FOREIGN = "foreign."
_FIX = "make the file again with `lora-pipe extract`"


def recognises(_names: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a header is of this format; asked last, because others may carry this key too."""
    return METADATA_KEY in metadata


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads the adapter out of a file's tensors and metadata.

    Raises:
        CorruptError: A tensor too many or too few, a shape that does not fit, an unknown version.
    """
    alphas, provenance = _parse_metadata(metadata)
    embeddings = _under(_EMBEDDING, tensors)
    expected = {f"{target}.{side}" for target in alphas for side in ("down", "up")}
    found = {name for name in tensors if not name.startswith((_EMBEDDING, _FOREIGN))}
    if expected != found:
        name = min(expected ^ found)
        raise CorruptError(name, "is missing" if name in expected else "has no alpha in the metadata", _FIX)
    factors = {}
    for target, alpha in alphas.items():
        try:
            factors[target] = LoraFactors(tensors[f"{target}.down"], tensors[f"{target}.up"], alpha)
        except CorruptError as error:
            raise CorruptError(target, error.problem, error.fix) from None
    return Adapter(factors, embeddings, provenance, _under(_FOREIGN, tensors))


def render(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of an adapter; `parse` gives the same adapter back."""
    tensors = {f"{target}.down": factors.down for target, factors in adapter.factors.items()}
    tensors |= {f"{target}.up": factors.up for target, factors in adapter.factors.items()}
    tensors |= {_EMBEDDING + token: rows for token, rows in adapter.embeddings.items()}
    tensors |= {_FOREIGN + name: tensor for name, tensor in adapter.foreign.items()}
    alphas = {target: factors.alpha for target, factors in adapter.factors.items()}
    document = {"alphas": alphas, "format": VERSION, "provenance": adapter.provenance}
    return tensors, {METADATA_KEY: json.dumps(document, sort_keys=True, allow_nan=False)}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parse_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, float], dict[str, Any]]:
    try:
        document = json.loads(metadata[METADATA_KEY])
        version, alphas, provenance = document["format"], document["alphas"], document["provenance"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(METADATA_KEY, f"the metadata cannot be read: {error!r:.100}", _FIX) from None
    if version != VERSION:
        raise CorruptError(METADATA_KEY, f"format {version!r}, this program reads {VERSION}", "update lora-pipeline")
    if not isinstance(alphas, dict) or not isinstance(provenance, dict):
        raise CorruptError(METADATA_KEY, "alphas and provenance must be objects", _FIX)
    for target, alpha in alphas.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise CorruptError(target, f"alpha is {alpha!r}", _FIX)
    return {target: float(alpha) for target, alpha in alphas.items()}, provenance
