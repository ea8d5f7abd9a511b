"""A tiny random base in memory; its tokenizer is read from a folder, as diffusers wants it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.injection.inject import collect, inject_new, remove, select_targets, trainable
from lora_pipeline.pretrained.blank import blank_tokenizer, seeded
from lora_pipeline.pretrained.components import Components

WIDTH = 8


@pytest.fixture
def components(tmp_path: Path) -> Components:
    tokenizer = blank_tokenizer(["a", "creature", "dog"], tmp_path / "tokenizer")
    size = len(tokenizer)
    with seeded(0):
        unet = UNet2DConditionModel(
            sample_size=4, block_out_channels=(8, 8), layers_per_block=1,
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
    for model in (unet, vae, text_encoder):
        model.eval().requires_grad_(False)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    return Components(tokenizer, text_encoder, vae, unet, scheduler)


@pytest.fixture
def adapter(components: Components) -> Adapter:
    """Random factors for both models, and a token."""
    source = torch.Generator().manual_seed(1)
    factors: dict[str, LoraFactors] = {}
    for prefix, glob in (("unet", "*attn*.to_?"), ("text_encoder", "*_proj")):
        model = getattr(components, prefix)
        inject_new(model, prefix, select_targets(model, prefix, [glob]), "new", rank=2, alpha=2.0, generator=source)
        for parameter in trainable(model).values():
            parameter.data = torch.randn(parameter.shape, generator=source)
        factors |= collect(model, prefix, "new")
        remove(model)
    return Adapter(factors, {"<zorp>": torch.randn(1, WIDTH, generator=source)}, {"params": {}})
