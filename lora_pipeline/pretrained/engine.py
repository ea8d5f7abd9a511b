"""How a UNet computes: activations made again to save memory, and compiled. Neither changes its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo

BACKEND = "inductor"
_SHAPES = 128  # each picture size and set of what learns is compiled once


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
    """Inside, the UNet is compiled, with whatever is injected, at its first use.

    As one: compiled block by block, entering and leaving blocks costs small bases what it gains.
    """
    if not wanted:
        yield
        return
    unet.forward = torch.compile(unet.forward, dynamic=False, backend=BACKEND)
    try:
        with torch._dynamo.config.patch(recompile_limit=_SHAPES):
            yield
    finally:
        del unet.forward
