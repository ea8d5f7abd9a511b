"""New branches that learn, of every kind: what they start from. None changes anything yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Size, Tensor

from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.spectrum import low_rank
from lora_pipeline.errors import ParamsError
from lora_pipeline.injection.branches import LohaBranch, LokrBranch, LoraBranch, PissaBranch
from lora_pipeline.injection.initial import INITS, Init, kaiming

PISSA = "pissa"


@dataclass(frozen=True, eq=False)
class Place:
    """Where a branch is to be.

    Args:
        target: The layer.
        weight: Its weight, (out, in / groups[, height, width]).
        rank: Of the branch.
        alpha: Of the branch.
        generator: Decides what is drawn.
    """

    target: str
    weight: Tensor
    rank: int
    alpha: float
    generator: Generator

    def factors(self, init: Init) -> LoraFactors:
        """`down` as drawn, and `up` zero."""
        return _factors(self.weight.shape, self.rank, self.alpha, init, self.generator)


Make = Callable[[Place], LoraBranch]


def lora(init: Init = kaiming) -> Make:
    """Hu et al. 2021, arXiv:2106.09685; on convolutions it is called LoCon."""
    return lambda place: LoraBranch(place.factors(init), trainable=True)


def dora(init: Init = kaiming) -> Make:
    """Liu et al. 2024, arXiv:2402.09353; the magnitude starts as the norms of the weight's rows."""

    def make(place: Place) -> LoraBranch:
        norms = torch.linalg.vector_norm(place.weight.detach().float().flatten(1), dim=1)
        magnitude = norms.reshape(-1, *[1] * (place.weight.ndim - 1))
        return LoraBranch(place.factors(init), trainable=True, magnitude=magnitude)

    return make


def pissa(place: Place) -> LoraBranch:
    """Meng et al. 2024, arXiv:2404.02948; nothing is drawn."""
    matrix = place.weight.detach().float().flatten(1)
    best = low_rank(matrix, RankRule("rank", place.rank))
    root = math.sqrt(place.rank / place.alpha)
    tail = place.weight.shape[2:]
    down = (best.down * root).reshape(best.rank, *place.weight.shape[1:])
    up = (best.up * root).reshape(-1, best.rank, *[1] * len(tail))
    return PissaBranch(LoraFactors(down.cpu(), up.cpu(), place.alpha))


def loha(place: Place) -> LoraBranch:
    """Starts as in LyCORIS: one product of deviations 1 and 0.1, of the other `down` of deviation 1."""
    down, other_down = (_normal(place.rank, place.weight.shape[1:], place.generator) for _ in range(2))
    tail = [1] * (place.weight.ndim - 2)
    up = torch.zeros(place.weight.shape[0], place.rank, *tail)
    other_up = 0.1 * torch.randn(up.shape, generator=place.generator)
    factors, others = LoraFactors(down, up, place.alpha), LoraFactors(other_down, other_up, place.alpha)
    return LohaBranch(factors, others)


def lokr(factor: int | None) -> Make:
    """The sides of the left block are the largest divisors of the weight's sides up to a factor.

    Args:
        factor: See above; None for the square root of each side.
    """

    def make(place: Place) -> LoraBranch:
        out, inputs, *kernel = place.weight.shape
        rows, columns = (_divisor(side, factor) for side in (out, inputs))
        shape = Size((out // rows, inputs // columns, *kernel))
        check_rank(place.target, place.rank, shape)
        left = kaiming(rows, Size((columns,)), place.generator)
        return LokrBranch(_factors(shape, place.rank, place.alpha, kaiming, place.generator), left)

    return make


def maker(kind: str, init: str, factor: int | None) -> Make:
    """Of values of params.yaml.

    Raises:
        ParamsError: An `init` or a `factor` that the kind does not have.
    """
    if factor is not None and kind != "lokr":
        raise ParamsError("adapter.factor", f"is of kind lokr, and kind is {kind}", "write null")
    if kind in ("loha", "lokr") and init != "kaiming":
        raise ParamsError("adapter.init", f"is {init}, and kind {kind} has a start of its own", "write kaiming")
    if init == PISSA:
        if kind != "lora":
            raise ParamsError("adapter.init", f"is pissa, which is of kind lora, and kind is {kind}", "write kaiming")
        return pissa
    start = INITS[init]
    return {"lora": lora(start), "dora": dora(start), "loha": loha, "lokr": lokr(factor)}[kind]


def check_rank(target: str, rank: int, shape: Size) -> None:
    """Refuses a rank that no product of this shape can have.

    Raises:
        ParamsError: It is below 1 or above the shorter side.
    """
    largest = min(shape[0], math.prod(shape[1:]))
    if not 1 <= rank <= largest:
        raise ParamsError("adapter.rank", f"{rank} does not fit {target}", f"use a rank between 1 and {largest}")


def _factors(shape: Size, rank: int, alpha: float, init: Init, generator: Generator) -> LoraFactors:
    up = torch.zeros(shape[0], rank, *[1] * (len(shape) - 2))
    return LoraFactors(init(rank, shape[1:], generator), up, alpha)


def _normal(rank: int, shape: Size, generator: Generator) -> Tensor:
    return torch.randn(rank, *shape, generator=generator)


def _divisor(side: int, factor: int | None) -> int:
    most = min(factor or side, math.isqrt(side))
    return next(each for each in range(most, 0, -1) if side % each == 0)
