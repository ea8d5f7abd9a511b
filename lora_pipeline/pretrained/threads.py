"""How many threads a model's operations get on a CPU."""

from __future__ import annotations

import torch
from torch import nn

# Half of Stable Diffusion 1.5's text encoder: anything people paint with is above, the toy models are far below.
SMALL = 60_000_000


def is_small(model: nn.Module) -> bool:
    """Whether the threads of one operation would wait for each other longer than they work."""
    return sum(weight.numel() for weight in model.parameters()) < SMALL


def settle_threads(model: nn.Module) -> None:
    """Keep the operations of a small `model` to one thread; larger ones use what torch or OMP_NUM_THREADS says.

    On a busy machine threads wait for whole time slices. One thread also makes the bytes of a run the same on any
    number of cores.
    """
    if is_small(model):
        torch.set_num_threads(1)
