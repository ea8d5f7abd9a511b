"""diffusers folders: which files hold weights, and what their tensors are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_pipeline.adapters.checkpoints.single_file import VAE, canonical
from lora_pipeline.adapters.checkpoints.slots import Place, Slot, placed
from lora_pipeline.adapters.fingerprint import (
    TEXT_ENCODER_2_WEIGHTS,
    TEXT_ENCODER_WEIGHTS,
    UNET_WEIGHTS,
    VAE_WEIGHTS,
    weight_files,
)
from lora_pipeline.adapters.header import TensorEntry, read_header
from lora_pipeline.adapters.storage import disk_errors
from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from lora_pipeline.errors import CorruptError

COMPONENTS = {
    UNET: UNET_WEIGHTS, TEXT_ENCODER: TEXT_ENCODER_WEIGHTS, TEXT_ENCODER_2: TEXT_ENCODER_2_WEIGHTS, VAE: VAE_WEIGHTS,
}  # fmt: skip
_WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".onnx"}


def component_files(base: Path, models: Collection[str]) -> dict[str, list[Path]]:
    """Each model's weight files; the second text encoder is there only where there is one.

    Raises:
        MissingError, CorruptError: See `weight_files`.
    """
    there = [model for model in models if model != TEXT_ENCODER_2 or (base / TEXT_ENCODER_2).is_dir()]
    return {model: weight_files(base, COMPONENTS[model]) for model in there}


def slots_of_component(model: str, entries: Mapping[str, TensorEntry]) -> dict[str, Slot]:
    """What each tensor of a component's file is."""
    return {key: Slot((canonical(model, key),), entry.shape, entry.dtype) for key, entry in entries.items()}


def places_in_folder(base: Path, models: Collection[str]) -> dict[str, Place]:
    """The place of each parameter of these models.

    Raises:
        MissingError, CorruptError: See `component_files` and `read_header`.
    """
    places: dict[str, Place] = {}
    for model, files in component_files(base, models).items():
        for file in files:
            entries = read_header(file).tensors
            places |= placed(file, entries, slots_of_component(model, entries))
    return places


def copy_others(base: Path, out: Path, models: Collection[str]) -> None:
    """Copies everything but the weights of these models, in whatever form."""
    for source in sorted(base.rglob("*")):
        path = source.relative_to(base)
        written = len(path.parts) == 1 or path.parts[0] in models
        if source.is_file() and not (written and source.suffix in _WEIGHTS):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / path)


def correct_index(index: Path, size: int) -> None:
    """Tells the index of shards, if there is one, how many bytes of tensors they hold."""
    if index.is_file():
        document = json.loads(index.read_text("utf-8"))
        document["metadata"] = {**document.get("metadata", {}), "total_size": size}
        write_json(index, document)


def correct_config(config: Path, vocabulary: int | None, dtype: str | None) -> None:
    """Tells a text encoder's config too: transformers believes it over the file about the vocabulary and the dtype."""
    changes: dict[str, Any] = {} if vocabulary is None else {"vocab_size": vocabulary}
    try:
        document = json.loads(config.read_text("utf-8"))
        if dtype is not None:
            changes["torch_dtype" if "torch_dtype" in document else "dtype"] = dtype
        changed = document | changes
    except (ValueError, TypeError, RecursionError):
        raise CorruptError(str(config), "is no JSON object", "get the base again") from None
    if changes:
        write_json(config, changed)


def write_json(path: Path, document: object) -> None:
    """Writes a JSON file of sorted keys.

    Raises:
        ResourceError, MissingError: See `disk_errors`.
    """
    with disk_errors(path):
        path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")
