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
from transformers import CLIPTextConfig, CLIPTextModel

from lora_pipeline.data.dataset import Example, read_examples, write_metadata
from lora_pipeline.pretrained.blank import blank_tokenizer, seeded
from lora_pipeline.pretrained.components import Components
from lora_pipeline.training.tuning import Task

WIDTH = 8


def components(folder: Path, prediction: str = "v_prediction") -> Components:
    tokenizer = blank_tokenizer(["a", "creature", "dog"], folder)
    size = len(tokenizer)
    with seeded(0):
        unet = UNet2DConditionModel(
            sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH, norm_num_groups=2, attention_head_dim=4,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=4, sample_size=8,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=size, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=24, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
            )
        )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for model in (unet, vae, text_encoder):
        model.eval().requires_grad_(False)
    return Components(tokenizer, text_encoder, vae, unet, scheduler)


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
