"""A base whose own weights were learnt, as a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lora_pipeline.adapters.checkpoints.folder import component_files, copy_others, slots_of_component
from lora_pipeline.adapters.checkpoints.slots import Place, placed
from lora_pipeline.adapters.header import read_header
from lora_pipeline.adapters.storage import DTYPE_NAMES, disk_errors, stream_tensors
from lora_pipeline.adapters.targets import MODELS
from lora_pipeline.errors import CorruptError


def write_tuned(base: Path, weights: Mapping[str, Tensor], out: Path) -> None:
    """Writes the base with some of its parameters replaced; what is not replaced keeps its bytes.

    Args:
        base: A diffusers folder.
        weights: By canonical name (see `adapters.weights`), in the dtype to be stored.
        out: The folder to write.

    Raises:
        CorruptError: A parameter that the base does not have.
        MissingError, ResourceError: See `weight_files` and `disk_errors`.
    """
    files = component_files(base, MODELS)
    with disk_errors(out):
        copy_others(base, out, files)
    left = set(weights)
    for model, shards in files.items():
        for file in shards:
            header = read_header(file)
            slots = slots_of_component(model, header.tensors)
            places = placed(file, header.tensors, slots)
            names = {key: slot.names[0] for key, slot in slots.items()}
            left -= set(names.values())
            layout = {key: _layout(places[name], weights.get(name)) for key, name in names.items()}
            place = out / file.relative_to(base)
            stream_tensors(
                place,
                layout,
                header.metadata,
                lambda key, names=names, places=places: [weights.get(names[key], places[names[key]].span)],  # type: ignore[misc]  # mypy cannot type a lambda's default
            )
    if left:
        raise CorruptError(min(left), "is no parameter of this base", "train on the base itself")


def _layout(place: Place, weight: Tensor | None) -> tuple[str, tuple[int, ...]]:
    return (
        (place.entry.dtype, place.entry.shape) if weight is None else (DTYPE_NAMES[weight.dtype], tuple(weight.shape))
    )
