"""What the down side of new factors starts from; the up side starts at zero, so that nothing changes yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Size, Tensor

Init = Callable[[int, Size, Generator], Tensor]


def kaiming(rank: int, shape: Size, generator: Generator) -> Tensor:
    """(rank, *shape), uniform to 1 / sqrt(fan in), as in the code of arXiv:2106.09685 (kaiming_uniform_, a = sqrt 5).

    Args:
        rank: Of the factors.
        shape: Of the weight without its first side.
        generator: Decides it.
    """
    bound = 1.0 / math.sqrt(math.prod(shape))
    return torch.rand(rank, *shape, generator=generator, device=generator.device) * (2 * bound) - bound


def normal(rank: int, shape: Size, generator: Generator) -> Tensor:
    """(rank, *shape), of deviation 1 / rank whatever the fan in, as in cloneofsimo/lora."""
    return torch.randn(rank, *shape, generator=generator, device=generator.device) / rank


def orthogonal(rank: int, shape: Size, generator: Generator) -> Tensor:
    """(rank, *shape), rows that are orthogonal and as long as those of `kaiming` are on average: 1 / sqrt 3."""
    drawn = torch.randn(math.prod(shape), rank, generator=generator, device=generator.device)
    rows: Tensor = torch.linalg.qr(drawn).Q.T
    return rows.reshape(rank, *shape).contiguous() / math.sqrt(3.0)


INITS: Mapping[str, Init] = {"kaiming": kaiming, "normal": normal, "orthogonal": orthogonal}
