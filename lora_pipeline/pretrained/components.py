"""A base from its folder: checked, complete, finite, frozen, in float32, without a network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from lora_pipeline.errors import CorruptError, MissingError
from lora_pipeline.pretrained.threads import settle_threads

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
# Schedulers that sample from any step list and add noise by the training's betas.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
)


@dataclass(frozen=True)
class Components:
    """The parts of a Stable Diffusion base."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: Any


def load_components(base: Path) -> Components:
    """The base in the diffusers folder `base`.

    Raises:
        MissingError: The folder or a part of it is not there.
        CorruptError: A part cannot be read, is of a kind that is not supported, or holds NaN or infinity.
    """
    index = read_index(base)
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise CorruptError(
            str(base), f"is a {kind}, not a StableDiffusionPipeline", "use a Stable Diffusion 1.x or 2.x"
        )
    transformers.utils.logging.disable_progress_bar()  # ours says what takes long
    for part in PARTS:
        if not (base / part).is_dir():
            raise MissingError(str(base / part), "the base lacks this part", "download or copy the whole base again")
    unet = _frozen(base / "unet", UNet2DConditionModel)
    settle_threads(unet)
    return Components(
        tokenizer=_loaded(base / "tokenizer", CLIPTokenizer),
        text_encoder=_frozen(base / "text_encoder", CLIPTextModel),
        vae=_frozen(base / "vae", AutoencoderKL),
        # Convolutions are 10-20 % faster with the channels innermost.
        unet=unet.to(memory_format=torch.channels_last),
        scheduler=_scheduler(base, index),
    )


def read_index(base: Path) -> dict[str, Any]:
    """`model_index.json`, checked to be an object."""
    path = base / "model_index.json"
    if not base.is_dir():
        fix = "set `base` in params.yaml to a diffusers folder, or check out models/base"
        raise MissingError(str(base), "there is no such base folder", fix)
    if not path.is_file():
        raise MissingError(
            str(path), "is not there, so this is no diffusers folder", "set `base` to a diffusers folder"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(str(path), f"is not JSON ({error})", "copy the base again") from error
    if not isinstance(index, dict):
        raise CorruptError(str(path), "is not a JSON object", "copy the base again")
    return index


def _loaded(folder: Path, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptError(str(folder), f"cannot be read ({reason})", "download or copy the base again") from error


def _frozen(folder: Path, kind: Any) -> Any:
    options = {"use_safetensors": True}
    model: nn.Module = _loaded(folder, kind, **options)
    model.float().eval().requires_grad_(requires_grad=False)
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise CorruptError(f"{folder}: {name}", "holds NaN or infinity", "download or copy the base again")
    return model


def _scheduler(base: Path, index: dict[str, Any]) -> Any:
    entry = index.get("scheduler")
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if name not in SCHEDULERS:
        fix = f"name one of {', '.join(SCHEDULERS)} in model_index.json"
        raise CorruptError(str(base), f"has the scheduler {name}, which is not supported", fix)
    return _loaded(base / "scheduler", getattr(diffusers, name))
