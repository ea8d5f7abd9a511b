"""What a file's header says about it, without torch and without reading a single weight."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_pipeline.adapters.header import Header, read_header
from lora_pipeline.adapters.peft_folder import read_folder_header, weight_files
from lora_pipeline.adapters.recognition import PEFT, recognise

_DOWN = (".down", ".lora_A.weight")
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
    folder = path.is_dir()
    header = read_folder_header(path) if folder else read_header(path)
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    downs = {name: entry for name, entry in header.tensors.items() if name.endswith(_DOWN)}
    tokens = {
        name.removeprefix(start): entry.shape[0]
        for name, entry in header.tensors.items()
        for start in _EMBEDDINGS
        if name.startswith(start) and entry.shape
    }
    return Description(
        format=PEFT if folder else recognise(shapes, header.metadata) or "unknown",
        layers=_counted(name.partition(".")[0] for name in downs),
        ranks=_counted(entry.shape[0] for entry in downs.values() if entry.shape),
        tokens=dict(sorted(tokens.items())),
        dtypes=_counted(entry.dtype for entry in header.tensors.values()),
        parameters=sum(math.prod(entry.shape) for entry in header.tensors.values()),
        size=sum(each.stat().st_size for each in (weight_files(path).values() if folder else [path])),
        provenance=_provenance(header),
    )


def _provenance(header: Header) -> dict[str, Any]:
    try:
        document = json.loads(header.metadata.get("lora_pipeline", "{}"))
    except (ValueError, RecursionError):
        return {}
    provenance = document.get("provenance", document) if isinstance(document, dict) else {}
    return provenance if isinstance(provenance, dict) else {}


def _counted(values: Any) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))
