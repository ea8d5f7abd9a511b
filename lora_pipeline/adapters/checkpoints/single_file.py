"""Single-file checkpoints of SD1.x, SD2.x and SDXL: what their tensors are called.

| | SD1 | SD2 | SDXL |
| --- | --- | --- | --- |
| UNet | `model.diffusion_model.` | the same | the same |
| autoencoder | `first_stage_model.` | the same | the same |
| text encoder | `cond_stage_model.transformer.` | `cond_stage_model.model.` | `conditioner.embedders.0.transformer.` |
| second | | | `conditioner.embedders.1.model.` |

`model.` stands before OpenCLIP's names, `transformer.` before those of transformers. How many blocks and layers there
are is read from the names themselves. Source: diffusers, loaders/single_file_utils.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_pipeline.adapters.checkpoints import openclip_names, unet_names, vae_names
from lora_pipeline.adapters.checkpoints.renaming import renamed
from lora_pipeline.adapters.checkpoints.slots import OTHER, Place, Slot
from lora_pipeline.adapters.header import TensorEntry
from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2, UNET, root, target_of
from lora_pipeline.errors import CorruptError

VAE = "vae"
POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, ...: transformers kept them in files once, OpenCLIP never did
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_SDXL_CLIP, _SDXL_OPENCLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_MODELS = {
    _UNET: UNET, _VAE: VAE, _CLIP: TEXT_ENCODER, _OPENCLIP: TEXT_ENCODER, _SDXL_CLIP: TEXT_ENCODER,
    _SDXL_OPENCLIP: TEXT_ENCODER_2,
}  # fmt: skip


def slots_of_file(entries: Mapping[str, TensorEntry]) -> dict[str, Slot]:
    """What each tensor of a single file is; what no model has a parameter for is `OTHER`."""
    slots = {key: Slot((OTHER + key,), entry.shape, entry.dtype) for key, entry in entries.items()}
    for start, model in _MODELS.items():
        inner = [key.removeprefix(start) for key in entries if key.startswith(start)]
        for name, paths in _parameters(start, inner).items():
            entry = entries[start + name]
            transposed = name == openclip_names.PROJECTION[1] and start in (_OPENCLIP, _SDXL_OPENCLIP)
            names = tuple(canonical(model, path) for path in paths)
            slots[start + name] = Slot(names, entry.shape, entry.dtype, transposed)
    return slots


def slots_for(places: Mapping[str, Place]) -> dict[str, Slot]:
    """The tensors of a single file with the parameters of a folder, by their keys.

    Raises:
        CorruptError: A parameter that single files have no name for.
    """
    slots: dict[str, Slot] = {}
    for start in _starts(places):
        model = _MODELS[start]
        before = canonical(model, "")
        inner = [name.removeprefix(before) for name in places if name.startswith(before)]
        keys = _keys(start, inner)
        unknown = set(inner) - {path for paths in keys.values() for path in paths} - {POSITION_IDS}
        if unknown:
            problem = "has no name in single files, which are of SD1.x, SD2.x or SDXL"
            raise CorruptError(before + min(unknown), problem, "keep this model as a diffusers folder")
        for key, paths in keys.items():
            transposed = start in (_OPENCLIP, _SDXL_OPENCLIP) and key == openclip_names.PROJECTION[1]
            slots[start + key] = _slot(tuple(before + path for path in paths), places, transposed)
    return slots


def canonical(model: str, path: str) -> str:
    """The canonical name of a parameter (see `weights`), of the autoencoder too."""
    return f"{VAE}.{vae_names.modern(path)}" if model == VAE else target_of(model, path)


def _starts(places: Mapping[str, Place]) -> list[str]:
    if any(name.startswith(root(TEXT_ENCODER_2)) for name in places):
        return [_UNET, _VAE, _SDXL_CLIP, _SDXL_OPENCLIP]
    # SD2 projects into its transformers linearly, SD1 with 1 x 1 convolutions
    linear = any(name.endswith(".proj_in.weight") and len(place.shape) == 2 for name, place in places.items())
    return [_UNET, _VAE, _OPENCLIP if linear else _CLIP]


def _parameters(start: str, keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The paths in diffusers' models, by the names in the file."""
    if start in (_CLIP, _SDXL_CLIP):
        return {key: (key,) for key in keys}
    if start in (_OPENCLIP, _SDXL_OPENCLIP):
        return openclip_names.fused_of_single_file(keys)
    pairs = (unet_names if start == _UNET else vae_names).pairs_of_single_file(keys)
    beginnings = {theirs: ours for ours, theirs in pairs}
    return {key: (name,) for key in keys if (name := renamed(key, beginnings)) is not None}


def _keys(start: str, paths: Collection[str]) -> dict[str, tuple[str, ...]]:
    """As `_parameters`, from diffusers' names; those unknown to single files are left out."""
    if start in (_CLIP, _SDXL_CLIP):
        return {f"text_model.{path}": (path,) for path in paths}
    if start in (_OPENCLIP, _SDXL_OPENCLIP):
        return openclip_names.fused_of_diffusers(paths)
    beginnings = dict((unet_names if start == _UNET else vae_names).pairs_of_diffusers(paths))
    return {key: (path,) for path in paths if (key := renamed(path, beginnings)) is not None}


def _slot(names: tuple[str, ...], places: Mapping[str, Place], transposed: bool) -> Slot:
    first = places[names[0]]
    shape = first.shape
    for name in names:
        if places[name].shape != shape:
            raise CorruptError(name, f"is {places[name].shape}, {names[0]} is {shape}", "get the base again")
    if len(names) > 1:
        shape = (shape[0] * len(names), *shape[1:])
    if vae_names.is_attention_weight(names[0]) and len(shape) == 2:
        shape = (*shape, 1, 1)
    return Slot(names, shape[::-1] if transposed else shape, first.entry.dtype, transposed)
