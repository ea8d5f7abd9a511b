"""Random adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors

SHAPES = {
    "unet.mid_block.attentions.0.to_q": (6, 4),
    "unet.mid_block.resnets.0.conv1": (5, 4, 3, 3),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    def make(seed: int, *, tokens: tuple[str, ...] = (), base: str | None = None) -> Adapter:
        source = torch.Generator().manual_seed(seed)
        factors = {}
        for index, (target, shape) in enumerate(SHAPES.items()):
            rank = 1 + (seed + index) % 3
            down = torch.randn(rank, *shape[1:], generator=source)
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=source)
            factors[target] = LoraFactors(down, up, alpha=0.5 * (seed + index + 1))
        embeddings = {token: torch.randn(2, 8, generator=source) for token in tokens}
        return Adapter(factors, embeddings, {"base": base} if base else {})

    return make
