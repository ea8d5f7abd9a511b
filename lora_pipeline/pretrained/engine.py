"""How a UNet computes: activations made again to save memory, and compiled blocks. Neither changes its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

BACKEND = "inductor"
_REPEATED = (BasicTransformerBlock, ResnetBlock2D)
_SHAPES = 128  # of one kind of block: each channel count, picture size and set of factors is compiled once


@contextmanager
def checkpointed(unet: Any, wanted: bool) -> Iterator[None]:
    """Inside, only the ends of blocks are kept for the backward pass, and the rest is computed again (diffusers')."""
    if not wanted:
        yield
        return
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


@contextmanager
def compiled(unet: Any, wanted: bool) -> Iterator[None]:
    """Inside, each transformer block and residual block is compiled, with whatever is injected, at its first use."""
    if not wanted:
        yield
        return
    blocks = [module for module in unet.modules() if isinstance(module, _REPEATED)]
    with torch._dynamo.config.patch(recompile_limit=_SHAPES):
        for block in blocks:
            block.compile(dynamic=False, backend=BACKEND)
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
