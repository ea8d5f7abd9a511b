"""A Stable Diffusion of a few thousand parameters that was never trained, and pictures to tune it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from train_values import train_params
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_pipeline.data.dataset import Example, read_examples, write_metadata
from lora_pipeline.pretrained.blank import blank_tokenizer, seeded
from lora_pipeline.pretrained.components import Components
from lora_pipeline.training.tuning import Task

WIDTH, WIDTH_2 = 8, 12
KINDS = ("sd1", "sd2", "sd2-inpaint", "xl", "xl-inpaint")


def components(folder: Path, prediction: str = "v_prediction", kind: str = "sd1") -> Components:
    """A base of one of `KINDS`."""
    tokenizer = blank_tokenizer(["a", "creature", "dog"], folder)
    xl = kind.startswith("xl")
    with seeded(0):
        unet = UNet2DConditionModel(**unet_config(kind))
        vae = AutoencoderKL(
            block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=4, sample_size=8,
        )  # fmt: skip
        text_encoder = CLIPTextModel(text_config(len(tokenizer), WIDTH, layers=2 if xl else 1))
        second = CLIPTextModelWithProjection(text_config(len(tokenizer), WIDTH_2, layers=2)) if xl else None
    scheduler = DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for model in (unet, vae, text_encoder, *([second] if second else [])):
        model.eval().requires_grad_(False)
    first = Components(tokenizer, text_encoder, vae, unet, scheduler)
    return replace(first, **second_reader(folder, second)) if second else first


def unet_config(kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "sample_size": 4, "in_channels": 9 if kind.endswith("inpaint") else 4, "out_channels": 4,
        "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH, "use_linear_projection": kind != "sd1",
    }  # fmt: skip
    if not kind.startswith("xl"):
        return config
    return config | {
        "cross_attention_dim": WIDTH + WIDTH_2, "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + WIDTH_2,
    }  # fmt: skip


def text_config(words: int, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1,
        projection_dim=width,
    )  # fmt: skip


def second_reader(folder: Path, encoder: CLIPTextModelWithProjection) -> dict[str, Any]:
    """SDXL's second text encoder, which pads with exclamation marks and looks for a prompt's end by the largest id."""
    encoder.text_model.eos_token_id = encoder.config.eos_token_id = 2
    tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token="!")
    return {"tokenizer_2": tokenizer, "text_encoder_2": encoder, "empty_is_zero": True}


def examples(folder: Path, caption: str, count: int) -> tuple[Example, ...]:
    folder.mkdir()
    generator = np.random.default_rng(len(caption))
    for index in range(count):
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index:03}.png")
    write_metadata(folder, {f"{index:03}.png": caption for index in range(count)})
    return read_examples(folder)


def task(folder: Path, changes: Mapping[str, Any] | None = None) -> Task:
    own, of_class = examples(folder / "own", "a <zorp> creature", 3), examples(folder / "class", "a creature", 2)
    return Task("zorp", "<zorp>", own, of_class, train_params(changes or {}), seed=7)


def with_masks(task: Task) -> Task:
    """The same with masks of the pictures' left halves, but for the last picture."""
    masked = []
    for example in task.examples[:-1]:
        mask = Image.new("L", (8, 8))
        mask.paste(255, (0, 0, 4, 8))
        path = example.image.with_suffix(".mask.png")
        mask.save(path)
        masked.append(replace(example, mask=path))
    return replace(task, examples=(*masked, task.examples[-1]))
