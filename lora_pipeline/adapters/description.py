"""What a file's header says about it, without torch and without reading a single weight."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_pipeline.adapters.header import Header, read_header
from lora_pipeline.adapters.kohya_names import target_of_module, token_of_key
from lora_pipeline.adapters.recognition import recognise

_DOWN = (".down", ".lora_A.weight", ".lora_down.weight")
_EMBEDDINGS = ("embedding.", "lora_pipeline.embedding.")


@dataclass(frozen=True)
class Description:
    """A safetensors file at a glance.

    Args:
        format: See `recognition`; `unknown` where it is none of them.
        layers: How many layers it changes, by model.
        ranks: How many layers have each rank.
        tokens: Vectors by placeholder token.
        dtypes: How many tensors have each dtype.
        parameters: Numbers in all tensors together.
        size: Bytes of the file.
        provenance: Where it comes from; empty if it does not say.
    """

    format: str
    layers: dict[str, int]
    ranks: dict[int, int]
    tokens: dict[str, int]
    dtypes: dict[str, int]
    parameters: int
    size: int
    provenance: dict[str, Any]


def describe(path: Path) -> Description:
    """Reads a description.

    Raises:
        MissingError, CorruptError: See `read_header`.
    """
    header = read_header(path)
    downs = {name: entry for name, entry in header.tensors.items() if name.endswith(_DOWN)}
    tokens = {
        name.removeprefix(start): entry.shape[0]
        for name, entry in header.tensors.items()
        for start in _EMBEDDINGS
        if name.startswith(start) and entry.shape
    }
    bundled = {token_of_key(name): entry.shape[0] for name, entry in header.tensors.items() if entry.shape}
    tokens |= {key[0]: vectors for key, vectors in bundled.items() if key}
    return Description(
        format=recognise({name: entry.shape for name, entry in header.tensors.items()}, header.metadata) or "unknown",
        layers=_counted(map(_model, downs)),
        ranks=_counted(entry.shape[0] for entry in downs.values() if entry.shape),
        tokens=dict(sorted(tokens.items())),
        dtypes=_counted(entry.dtype for entry in header.tensors.values()),
        parameters=sum(math.prod(entry.shape) for entry in header.tensors.values()),
        size=path.stat().st_size,
        provenance=_provenance(header),
    )


def _model(name: str) -> str:
    return (target_of_module(name.partition(".")[0]) or name).partition(".")[0]


def _provenance(header: Header) -> dict[str, Any]:
    try:
        document = json.loads(header.metadata.get("lora_pipeline", "{}"))
    except (ValueError, RecursionError):
        return {}
    provenance = document.get("provenance", document) if isinstance(document, dict) else {}
    return provenance if isinstance(provenance, dict) else {}


def _counted(values: Any) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))
