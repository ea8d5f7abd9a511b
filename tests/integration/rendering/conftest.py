"""A tiny random base in memory; its tokenizer is read from a folder, as diffusers wants it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.injection.inject import collect, inject_new, remove, select_targets, trainable
from lora_pipeline.pretrained.components import Components


@pytest.fixture
def components(tmp_path: Path) -> Components:
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    made: Components = replace(tiny.components(tmp_path / "tokenizer"), scheduler=scheduler)
    return made


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
    return Adapter(factors, {"<zorp>": torch.randn(1, tiny.WIDTH, generator=source)}, {"params": {}})
