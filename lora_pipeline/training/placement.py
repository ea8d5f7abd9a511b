"""Where and in which precision a base computes while something is learnt on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from lora_pipeline.errors import ParamsError

if TYPE_CHECKING:
    from lora_pipeline.pretrained.components import Components

T = TypeVar("T")


def device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def placed(components: Components, precision: str) -> Iterator[None]:
    """Inside, the base is on the device, and computes in `precision`; afterwards its own tensors are back.

    The autoencoder stays in float32, as its activations are too large for float16.

    Args:
        components: The base, in float32.
        precision: `float32`, `bfloat16` or `float16`.

    Raises:
        ParamsError: float16 without a GPU.
    """
    where = device()
    if precision == "float16" and where.type == "cpu":
        problem = "float16 is for GPUs, and there is none here"
        raise ParamsError("engine.precision", problem, "use float32, or bfloat16 for half the memory")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, model in vars(components).items():
            if isinstance(model, nn.Module):
                dtype = torch.float32 if name == "vae" else getattr(torch, precision)
                for tensor in (*model.parameters(), *model.buffers()):
                    before.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(where, dtype if tensor.is_floating_point() else tensor.dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def moved(value: T, where: torch.device) -> T:
    """A dataclass with its tensors on `where`."""
    fields = vars(value).items()
    there = {name: each.to(where) for name, each in fields if isinstance(each, Tensor) and each.device != where}
    return replace(value, **there) if there else value  # type: ignore[type-var]
