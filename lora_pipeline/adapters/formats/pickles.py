"""What people keep in pickles, as the tensors and metadata of a safetensors file of the same format.

a list [up, down, up, down, ...]          cloneofsimo's X.pt or X.text_encoder.pt, with X.ti.pt beside them
{string_to_param: {*: rows}, name, ...}   AUTOMATIC1111's embedding (extensions-builtin, `textual_inversion.py`)
{name: tensor}, {state_dict: {...}}       any other format, saved as `.bin` or `.ckpt`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats.cloneofsimo import EMBED
from lora_pipeline.adapters.formats.embeddings import render_learned_embeds
from lora_pipeline.adapters.pickled import read_pickle, write_pickle
from lora_pipeline.adapters.positions import MODERN, UNET_CLASSES, unet_targets
from lora_pipeline.adapters.targets import TEXT_ENCODER, UNET
from lora_pipeline.errors import CorruptError

A1111 = "a1111"
_SUFFIXES = ("", ".text_encoder", ".ti")
_KEPT = ("step", "sd_checkpoint", "sd_checkpoint_name")
_STAR = 265  # `*</w>` in CLIP's vocabulary, which the format writes for every embedding


def read_tensors_of_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a pickle; of all three where it is one of cloneofsimo's trio.

    Raises:
        MissingError, CorruptError: See `read_pickle`; also where it holds none of what is listed above.
    """
    value = read_pickle(path)
    trio = _trio(path)
    if isinstance(value, list) or (path.stem.endswith(".ti") and len(trio) > 1):
        return _read_trio(trio)
    if isinstance(value, dict) and "string_to_param" in value:
        return _read_a1111(path, value)
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not value or not all(isinstance(each, Tensor) for each in value.values()):
        raise CorruptError(str(path), "holds no tensors by name", "get the safetensors version of it")
    return {str(name): tensor for name, tensor in value.items()}, {}


def render_a1111(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """AUTOMATIC1111's embedding, as the tensors and metadata that `write_a1111` writes.

    Raises:
        CorruptError: Layers, several tokens, or rows for a second text encoder.
    """
    return render_learned_embeds(adapter)


def write_a1111(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes AUTOMATIC1111's `.pt`; metadata other than its own has no place there.

    Raises:
        ResourceError, MissingError: See `storage.disk_errors`.
    """
    (token, rows), *_ = tensors.items()
    value = {
        "string_to_token": {"*": torch.tensor(_STAR)},
        "string_to_param": {"*": rows},
        "name": token,
        "step": int(metadata["step"]) if metadata.get("step", "").isdecimal() else None,
        "sd_checkpoint": metadata.get("sd_checkpoint"),
        "sd_checkpoint_name": metadata.get("sd_checkpoint_name"),
    }
    write_pickle(path, value)


def _trio(path: Path) -> dict[str, Path]:
    """The files that belong to one of cloneofsimo's, those that are there, by the middle of their names."""
    ending = path.suffix
    stem = path.stem
    for suffix in _SUFFIXES[1:]:
        stem = stem.removesuffix(suffix)
    found = {suffix: path.with_name(f"{stem}{suffix}{ending}") for suffix in _SUFFIXES}
    return {suffix: each for suffix, each in found.items() if each.is_file()}


def _read_trio(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files.values():
        value = read_pickle(path)
        if isinstance(value, dict) and all(isinstance(each, Tensor) for each in value.values()):
            tensors |= {str(token): rows for token, rows in value.items()}
            metadata |= dict.fromkeys(map(str, value), EMBED)
        elif isinstance(value, list) and len(value) % 2 == 0 and all(isinstance(each, Tensor) for each in value):
            model = _model(len(value) // 2)
            if f"{model}:0:up" in tensors:
                raise CorruptError(str(path), f"is a second file for the {model}", "move one of them away")
            for index, tensor in enumerate(value):
                tensors[f"{model}:{index // 2}:{'down' if index % 2 else 'up'}"] = tensor
        else:
            raise CorruptError(str(path), "is no list of pairs, up and down", "get the file again")
    return tensors, metadata


def _model(layers: int) -> str:
    return UNET if any(len(unet_targets(each, MODERN)) == layers for each in UNET_CLASSES) else TEXT_ENCODER


def _read_a1111(path: Path, value: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    rows = value["string_to_param"]
    if not isinstance(rows, dict) or len(rows) != 1 or not isinstance(next(iter(rows.values())), Tensor):
        raise CorruptError(f"{path}: string_to_param", "is not one embedding", "get the file again")
    name = value.get("name")
    token = name if isinstance(name, str) and name.strip() else path.stem
    metadata = {key: str(value[key]) for key in _KEPT if value.get(key) is not None}
    return {token.strip(): next(iter(rows.values()))}, metadata
