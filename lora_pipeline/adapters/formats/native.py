"""The native format, version 1.

Tensors: `<target>.down` and `<target>.up`, in the dtype they were trained in; DoRA's `<target>.magnitude`;
`embedding.<token>`, and `embedding_2.<token>` for SDXL's second encoder; `foreign.<name>` for what another format's
file held and nobody here understands.
Metadata: one key, `lora_pipeline`, holding sorted JSON::

    {"alphas": {target: alpha}, "format": 1, "provenance": {...}}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats.provenance import read_object
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import CorruptError

METADATA_KEY = "lora_pipeline"
VERSION = 1
_EMBEDDING, _EMBEDDING_2, _FOREIGN = "embedding.", "embedding_2.", "foreign."
_MAGNITUDE = ".magnitude"
_FIX = "make the file again with `lora-pipe extract`"


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads the adapter out of a file's tensors and metadata.

    Raises:
        CorruptError: A tensor too many or too few, a shape that does not fit, an unknown version.
    """
    alphas, provenance = _parse_metadata(metadata)
    expected = {f"{target}.{side}" for target in alphas for side in ("down", "up")}
    magnitudes = {target: tensors[target + _MAGNITUDE] for target in alphas if target + _MAGNITUDE in tensors}
    expected |= {target + _MAGNITUDE for target in magnitudes}
    found = {name for name in tensors if not name.startswith((_EMBEDDING, _EMBEDDING_2, _FOREIGN))}
    if expected != found:
        name = min(expected ^ found)
        raise CorruptError(name, "is missing" if name in expected else "has no alpha in the metadata", _FIX)
    factors = {}
    for target, alpha in alphas.items():
        try:
            factors[target] = LoraFactors(tensors[f"{target}.down"], tensors[f"{target}.up"], alpha)
        except CorruptError as error:
            raise CorruptError(target, error.problem, error.fix) from None
    return Adapter(
        factors,
        embeddings=_under(_EMBEDDING, tensors),
        embeddings_2=_under(_EMBEDDING_2, tensors),
        provenance=provenance,
        magnitudes=magnitudes,
        foreign=_under(_FOREIGN, tensors),
    )


def render(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of an adapter; `parse` gives the same adapter back."""
    tensors = {f"{target}.down": factors.down for target, factors in adapter.factors.items()}
    tensors |= {f"{target}.up": factors.up for target, factors in adapter.factors.items()}
    tensors |= {target + _MAGNITUDE: norms for target, norms in adapter.magnitudes.items()}
    tensors |= {_EMBEDDING + token: rows for token, rows in adapter.embeddings.items()}
    tensors |= {_EMBEDDING_2 + token: rows for token, rows in adapter.embeddings_2.items()}
    tensors |= {_FOREIGN + name: tensor for name, tensor in adapter.foreign.items()}
    alphas = {target: factors.alpha for target, factors in adapter.factors.items()}
    document = {"alphas": alphas, "format": VERSION, "provenance": adapter.provenance}
    return tensors, {METADATA_KEY: json.dumps(document, sort_keys=True, allow_nan=False)}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parse_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, float], dict[str, Any]]:
    try:
        document = read_object(metadata, METADATA_KEY)
        version, alphas, provenance = document["format"], document["alphas"], document["provenance"]
    except KeyError as error:
        raise CorruptError(METADATA_KEY, f"the metadata lacks {error}", _FIX) from None
    if version != VERSION:
        raise CorruptError(METADATA_KEY, f"format {version!r}, this program reads {VERSION}", "update lora-pipeline")
    if not isinstance(alphas, dict) or not isinstance(provenance, dict):
        raise CorruptError(METADATA_KEY, "alphas and provenance must be objects", _FIX)
    for target, alpha in alphas.items():
        if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:
            raise CorruptError(target, f"alpha is {alpha!r:.80}", _FIX)
    return {target: float(alpha) for target, alpha in alphas.items()}, provenance
