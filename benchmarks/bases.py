"""Stable Diffusion bases of random weights, equal in every process, and pictures to tune them on: speed needs no more.

`tenth` has Stable Diffusion 1.5's layers at a tenth of their width, UNet and autoencoder alike, so that encoding a
picture is about the share of a step that it is there. `sd15` has its true sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from lora_pipeline.data.dataset import write_metadata
from lora_pipeline.pretrained.blank import TOKENS as SHORT
from lora_pipeline.pretrained.blank import blank_tokenizer, seeded
from lora_pipeline.pretrained.components import Components, load_components

PROMPT = "a photo of zorp creature"
TOKENS = 77
PICTURES = 8
EMBEDDED = Path(__file__).parents[1] / "models" / "base"


class Size(NamedTuple):
    """What a base is built from."""

    unet: tuple[int, ...]
    vae: tuple[int, ...]
    groups: int
    text: int
    text_layers: int
    heads: int
    words: int
    pixels: int


SIZES = {
    "tenth": Size((32, 64, 128, 128), (12, 24, 48, 48), 12, 32, 2, 4, 600, 128),
    "sd15": Size((320, 640, 1280, 1280), (128, 256, 512, 512), 32, 768, 12, 12, 49408, 512),
}


def pixels_of(name: str) -> int:
    """The side of the pictures of a base."""
    return SIZES[name].pixels if name in SIZES else 64


def make_pictures(folder: Path, pixels: int) -> None:
    """Writes `PICTURES` pictures of noise and their captions."""
    generator = np.random.default_rng(0)
    for index in range(PICTURES):
        picture = Image.fromarray(generator.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8))
        picture.save(folder / f"{index:03}.png")
    write_metadata(folder, {f"{index:03}.png": PROMPT for index in range(PICTURES)})


def make_base(name: str, folder: Path) -> Components:
    """A base, in float32 on the CPU.

    Args:
        name: Of `SIZES`, or `embedded`, the one in models/base.
        folder: Where a tokenizer may be written.
    """
    if name == "embedded":
        return load_components(EMBEDDED)
    size = SIZES[name]
    tokenizer = blank_tokenizer(PROMPT.split(), folder)
    assert tokenizer.model_max_length == SHORT
    tokenizer.model_max_length = TOKENS
    with seeded(0):
        unet = make_unet(name)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.vae,
            layers_per_block=2,
            norm_num_groups=size.groups,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=max(size.words, len(tokenizer)),
                hidden_size=size.text,
                intermediate_size=4 * size.text,
                num_hidden_layers=size.text_layers,
                num_attention_heads=size.heads,
                max_position_embeddings=TOKENS,
                bos_token_id=len(tokenizer) - 2,
                eos_token_id=len(tokenizer) - 1,
                pad_token_id=len(tokenizer) - 1,
            )
        )
    models: tuple[Any, ...] = (unet, vae, text_encoder)
    for model in models:
        model.eval().requires_grad_(False)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return Components(tokenizer, text_encoder, vae, unet, scheduler)


def make_unet(name: str) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet at the size's widths."""
    size = SIZES[name]
    return UNet2DConditionModel(
        sample_size=size.pixels // 8,
        block_out_channels=size.unet,
        cross_attention_dim=size.text,
        attention_head_dim=8,
    )


def on_gpu(base: Components, dtype: torch.dtype) -> None:
    """Moves the models to the GPU, in a dtype."""
    models: tuple[Any, ...] = (base.unet, base.vae, base.text_encoder)
    for model in models:
        model.to(device="cuda", dtype=dtype)
