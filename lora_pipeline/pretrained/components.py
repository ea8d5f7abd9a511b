"""A base from its folder: checked, complete, finite, frozen, in float32, without a network."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from lora_pipeline.errors import CorruptError, MissingError
from lora_pipeline.pretrained.inpainting import channels_given
from lora_pipeline.pretrained.threads import settle_threads

_ONE_ENCODER = {
    "tokenizer": CLIPTokenizer, "text_encoder": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel,
}  # fmt: skip
_TWO_ENCODERS = {**_ONE_ENCODER, "tokenizer_2": CLIPTokenizer, "text_encoder_2": CLIPTextModelWithProjection}
# What a base is made of beside its scheduler, by the name of its pipeline in diffusers.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": _ONE_ENCODER,
    "StableDiffusionInpaintPipeline": _ONE_ENCODER,
    "StableDiffusionXLPipeline": _TWO_ENCODERS,
    "StableDiffusionXLInpaintPipeline": _TWO_ENCODERS,
}
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
    """The parts of a Stable Diffusion base.

    Args:
        tokenizer, text_encoder: The only ones, or SDXL's first.
        vae: Pictures to latents and back.
        unet: What denoises; see `denoising.Denoiser`.
        scheduler: Of diffusers.
        tokenizer_2, text_encoder_2: SDXL's second.
        empty_is_zero: Whether the base was trained to read zeros where there is no prompt, not the empty prompt.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: Any
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    empty_is_zero: bool = False

    @property
    def readers(self) -> dict[str, tuple[Any, Any]]:
        """Tokenizer and text encoder, by the prefix of the encoder's targets."""
        first: dict[str, tuple[Any, Any]] = {TEXT_ENCODER: (self.tokenizer, self.text_encoder)}
        if self.text_encoder_2 is None:
            return first
        return {**first, TEXT_ENCODER_2: (self.tokenizer_2, self.text_encoder_2)}

    @property
    def models(self) -> dict[str, Any]:
        """What can be adapted, by the prefix of its targets."""
        return {UNET: self.unet, **{prefix: encoder for prefix, (_, encoder) in self.readers.items()}}

    def with_own_tokenizers(self) -> Components:
        """The same with tokenizers that may be given tokens."""
        return replace(self, tokenizer=copy.deepcopy(self.tokenizer), tokenizer_2=copy.deepcopy(self.tokenizer_2))


def load_components(base: Path) -> Components:
    """The base in the diffusers folder `base`.

    Raises:
        MissingError: The folder or a part of it is not there.
        CorruptError: A part cannot be read, is of a kind that is not supported, or holds NaN or infinity.
    """
    index = read_index(base)
    kind = str(index.get("_class_name"))
    if kind not in KINDS:
        fix = "use a Stable Diffusion 1.x, 2.x or XL, or the inpainting form of one"
        raise CorruptError(str(base), f"is a {kind}, not one of {', '.join(KINDS)}", fix)
    transformers.utils.logging.disable_progress_bar()  # ours says what takes long
    for part in (*KINDS[kind], "scheduler"):
        if not (base / part).is_dir():
            raise MissingError(str(base / part), "the base lacks this part", "download or copy the whole base again")
    parts = {name: _part(base / name, of) for name, of in KINDS[kind].items()}
    settle_threads(parts["unet"])
    # Convolutions are 10-20 % faster with the channels innermost.
    parts["unet"].to(memory_format=torch.channels_last)
    empty_is_zero = index.get("force_zeros_for_empty_prompt", False) is True
    components = Components(**parts, scheduler=_scheduler(base, index), empty_is_zero=empty_is_zero)
    channels_given(components.unet, components.vae)
    return components


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


def _part(folder: Path, kind: Any) -> Any:
    return _frozen(folder, kind) if issubclass(kind, nn.Module) else _loaded(folder, kind)


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
