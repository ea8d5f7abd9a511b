"""How a UNet computes: activations made again to save memory, and compiled blocks. Neither changes its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

BACKEND = "inductor"
_REPEATED = (BasicTransformerBlock, ResnetBlock2D)
_SHAPES = 128  # of one block: each picture size and set of factors is compiled once


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
    for block in blocks:
        block.forward = torch.compile(_own(block), dynamic=False, backend=BACKEND)
    try:
        with torch._dynamo.config.patch(recompile_limit=_SHAPES):
            yield
    finally:
        for block in blocks:
            del block.forward


def _own(block: Any) -> MethodType:
    """A block's forward with code of its own.

    What is compiled is looked up by the code: blocks that share it would have the conditions of all others checked
    before their own, at every call.
    """
    shared = type(block).forward
    own = FunctionType(
        shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__
    )
    own.__kwdefaults__ = shared.__kwdefaults__
    return MethodType(own, block)
