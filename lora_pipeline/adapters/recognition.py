"""Which format a file is of, told by its header alone: names and shapes of tensors, and metadata. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
Metadata = Mapping[str, str]

PEFT = "peft"
CLONEOFSIMO = "cloneofsimo"
KOHYA = "kohya"
DIFFUSERS = "diffusers"
NATIVE = "native"
EMBEDDINGS = "embeddings"

_POSITION = re.compile(r"(unet|text_encoder):\d+:(up|down)")
_ERAS = re.compile(r"\.(lora_[AB](\.default(_0)?)?|(\w+_)?lora\.(down|up)|lora_linear_layer\.(down|up))\.weight$")
_MOST_EMBEDDINGS = 256


def recognise(shapes: Shapes, metadata: Metadata) -> str | None:
    """The name of the format, or None where it is none of ours.

    Args:
        shapes: Of every tensor, by its name in the file.
        metadata: The file's own, text by text.
    """
    return next((name for name, fits in _RULES if fits(shapes, metadata)), None)


def _any_starts(names: Iterable[str], *starts: str) -> bool:
    return any(name.startswith(starts) for name in names)


def _is_cloneofsimo(shapes: Shapes, metadata: Metadata) -> bool:
    return any(map(_POSITION.fullmatch, shapes)) or "<embed>" in metadata.values()


def _is_diffusers(shapes: Shapes, metadata: Metadata) -> bool:
    if "lora_adapter_metadata" in metadata:
        return True
    return any(_ERAS.search(name) for name in shapes) or _any_starts(shapes, "lora_pipeline.embedding")


def _is_native(shapes: Shapes, metadata: Metadata) -> bool:
    ours = not shapes or _any_starts(shapes, "unet.", "text_encoder", "embedding.", "embedding_2.", "foreign.")
    return ours and "lora_pipeline" in metadata


def _is_embeddings(shapes: Shapes, _metadata: Metadata) -> bool:
    """A few rows or single vectors, and no layer's name."""
    rows = all(len(shape) in (1, 2) for shape in shapes.values())
    return (
        0 < len(shapes) <= _MOST_EMBEDDINGS and rows and not any(name.endswith((".weight", ".bias")) for name in shapes)
    )


# Most telling first. Any file may carry our metadata beside its own keys, and any small file could be embeddings.
_RULES: tuple[tuple[str, Callable[[Shapes, Metadata], bool]], ...] = (
    (PEFT, lambda shapes, _: _any_starts(shapes, "base_model.model.")),
    (CLONEOFSIMO, _is_cloneofsimo),
    (KOHYA, lambda shapes, _: _any_starts(shapes, "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "bundle_emb.")),
    (DIFFUSERS, _is_diffusers),
    (NATIVE, _is_native),
    (EMBEDDINGS, _is_embeddings),
)
