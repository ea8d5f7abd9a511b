"""How fast a GPU multiplies matrices, and how much of that a training step is."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bases import SIZES, TOKENS, make_unet
from benchmarks.dreambooth import LAYERS
from benchmarks.rows import seconds

_SIDE, _PRODUCTS = 8192, 20


def of_matrices() -> float:
    """Operations a second of bfloat16 products of large square matrices, two a multiplication."""
    left, right = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(_PRODUCTS):
            torch.mm(left, right)
        torch.cuda.synchronize()

    return 2.0 * _SIDE**3 * _PRODUCTS / seconds(multiply)


def of_step(base: str, batch: int, rank: int) -> float:
    """Operations of a step's forward and backward pass through the UNet with an adapter, counted, not run."""
    size = SIZES[base]
    with torch.device("meta"):
        unet = make_unet(base).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, target_modules=LAYERS))
        latents = torch.randn(batch, 4, size.pixels // 8, size.pixels // 8)
        told, timesteps = torch.randn(batch, TOKENS, size.text), torch.zeros(batch, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            unet(latents, timesteps, told, return_dict=False)[0].sum().backward()
    return float(counter.get_total_flops())
