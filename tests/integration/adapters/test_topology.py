"""The frozen tables against the models themselves, built from their published configurations without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_pipeline.adapters.sgm import sgm_names
from lora_pipeline.adapters.targets import target_of
from lora_pipeline.adapters.topology import FAMILIES, family, layers

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
OPEN_CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
OPEN_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def live_layers(prefix: str, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        target_of(prefix, name): tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def model_layers(name: str) -> dict[str, tuple[int, ...]]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        found = live_layers("unet", UNet2DConditionModel(**UNETS[name]))
        first = CLIPTextModel(CLIPTextConfig(**(OPEN_CLIP_H if name == "sd2" else CLIP_L)))
        found |= live_layers("text_encoder", first)
        if name == "sdxl":
            found |= live_layers("text_encoder_2", CLIPTextModelWithProjection(CLIPTextConfig(**OPEN_CLIP_G)))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_has_the_models_layers_and_no_others(name: str) -> None:
    found = model_layers(name)
    assert layers(name) == found
    assert family(found) == name


@pytest.mark.parametrize("name", FAMILIES)
def test_sgms_names_are_those_of_original_checkpoints(name: str) -> None:
    """diffusers reads the checkpoint in which every layer holds its own name in diffusers."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        config = UNet2DConditionModel(**UNETS[name]).config
    expected = {f"{path}.{kind}": f"{path}.{kind}" for path in sgm_names(name) for kind in ("weight", "bias")}
    checkpoint = {
        f"model.diffusion_model.{sgm}.{kind}": f"{path}.{kind}"
        for path, sgm in sgm_names(name).items()
        for kind in ("weight", "bias")
    }
    assert convert_ldm_unet_checkpoint(checkpoint, config) == expected
