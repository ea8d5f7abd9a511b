"""A model written out: as a single file, or as a diffusers folder shaped like another."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from lora_pipeline.adapters.checkpoints.folder import (
    COMPONENTS,
    component_files,
    copy_others,
    correct_config,
    correct_index,
    slots_of_component,
)
from lora_pipeline.adapters.checkpoints.single_file import POSITION_IDS, VAE
from lora_pipeline.adapters.checkpoints.slots import OTHER, Place, Slot, placed
from lora_pipeline.adapters.checkpoints.torch_file import stream_torch_file
from lora_pipeline.adapters.header import Header, read_header
from lora_pipeline.adapters.merger import Merger
from lora_pipeline.adapters.storage import disk_errors, stream_tensors, tensor_size
from lora_pipeline.adapters.targets import MODELS, TEXT_ENCODER, TEXT_ENCODER_2, root
from lora_pipeline.errors import CorruptError

# Of training, or constants that diffusers computes itself: a folder has no place for them.
_DISPENSABLE = re.compile(
    r"(first_stage_model\.)?(model_ema|loss)\..*|.*\.(logit_scale|position_ids|attn_mask)"
    r"|alphas_cumprod(_prev)?|betas|(sqrt|log|posterior|denoiser)[._]\w+|lvlb_weights|logvar|scale_factor"
)


def write_file(
    out: Path, merger: Merger, slots: Mapping[str, Slot], metadata: Mapping[str, str], note: str | None
) -> None:
    """Writes a single file: a .ckpt if it is called so, else safetensors.

    Raises:
        CorruptError: See `stream_torch_file`.
        ResourceError, MissingError: See `written_whole`.
    """
    layout = {key: merger.layout(slot) for key, slot in slots.items()}
    if out.suffix == ".ckpt":
        stream_torch_file(out, layout, note, lambda key: merger.pieces(slots[key]))
    else:
        stream_tensors(out, layout, metadata, lambda key: merger.pieces(slots[key]))


def write_folder(template: Path, out: Path, merger: Merger, texts: Mapping[Path, str], *, converting: bool) -> None:
    """Writes a folder.

    Args:
        template: The folder whose other files are copied, and whose names and shards the weights get.
        out: The folder to write; it is made if it is not there.
        merger: The parameters.
        texts: What some of the other files say instead, by relative path.
        converting: Whether the parameters are another model's than the template's.

    Raises:
        CorruptError: A parameter that only one of the two has, or that is of another shape there.
        ResourceError, MissingError: See `disk_errors`.
    """
    files = component_files(template, (*MODELS, VAE) if converting else MODELS)
    headers = {file: read_header(file) for shards in files.values() for file in shards}
    slots = {
        file: slots_of_component(model, headers[file].tensors) for model, shards in files.items() for file in shards
    }
    if converting:
        merger = _completed(merger, headers, slots)
        slots = {file: _as_in(merger.places, template, each) for file, each in slots.items()}
        _check_nothing_lost(
            merger.places, {name for each in slots.values() for slot in each.values() for name in slot.names}
        )
    with disk_errors(out):
        copy_others(template, out, files)
        for name, text in texts.items():
            (out / name).write_text(text, "utf-8")
    for model, shards in files.items():
        size = 0
        for file in shards:
            place = out / file.relative_to(template)
            if not converting and all(map(merger.leaves, slots[file].values())):
                with disk_errors(place):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, place)
            else:
                _write(place, merger, slots[file], headers[file])
            size += sum(tensor_size(merger.layout(slot)) for slot in slots[file].values())
        correct_index(out / f"{COMPONENTS[model]}.index.json", size)
    _correct_configs(out, files, merger)


def _write(out: Path, merger: Merger, slots: Mapping[str, Slot], header: Header) -> None:
    layout = {key: merger.layout(slot) for key, slot in slots.items()}
    stream_tensors(out, layout, header.metadata, lambda key: merger.pieces(slots[key]))


def _completed(merger: Merger, headers: Mapping[Path, Header], slots: Mapping[Path, Mapping[str, Slot]]) -> Merger:
    """With the template's position ids, which single files may lack: they are 0, 1, 2, ..."""
    places = {
        name: place
        for file, header in headers.items()
        for name, place in placed(file, header.tensors, slots[file]).items()
        if name.endswith(POSITION_IDS)
    }
    return merger.with_places({**places, **merger.places})


def _as_in(places: Mapping[str, Place], template: Path, slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """The template's tensors in the dtypes of the parameters."""
    fix = "give a folder of the same family (SD1.x, SD2.x, SDXL) with --like"
    for slot in slots.values():
        name = slot.names[0]
        if name not in places:
            raise CorruptError(name, f"is in {template} and not in the base", fix)
        if places[name].shape != slot.shape:
            raise CorruptError(name, f"is {slot.shape} in {template}, {places[name].shape} in the base", fix)
    return {key: replace(slot, dtype=places[slot.names[0]].entry.dtype) for key, slot in slots.items()}


def _check_nothing_lost(places: Mapping[str, Place], written: Collection[str]) -> None:
    for name in sorted(set(places) - set(written)):
        if not _dispensable(name, written):
            where = name.removeprefix(OTHER)
            fix = "give a folder of the same family with --like, or write a single file"
            raise CorruptError(where, "has no place in a diffusers folder of this kind", fix)


def _dispensable(name: str, written: Collection[str]) -> bool:
    """SD2's files hold a last layer and a projection of the text encoder that its pipeline never asks for."""
    if name.startswith(OTHER):
        return _DISPENSABLE.fullmatch(name.removeprefix(OTHER)) is not None
    layer = re.match(re.escape(root(TEXT_ENCODER)) + r"encoder\.layers\.(\d+)\.", name)
    if layer is not None:
        number = int(layer[1])
        below = f"{root(TEXT_ENCODER)}encoder.layers.{{}}.layer_norm1.weight"
        return below.format(number - 1) in written and below.format(number) not in written
    return name == f"{root(TEXT_ENCODER)}text_projection.weight" or name.endswith(POSITION_IDS)


def _correct_configs(out: Path, models: Collection[str], merger: Merger) -> None:
    dtype = None if merger.dtype is None else str(merger.dtype).removeprefix("torch.")
    for model in (TEXT_ENCODER, TEXT_ENCODER_2):
        if model in models:
            correct_config(out / model / "config.json", merger.vocabulary(model), dtype)
