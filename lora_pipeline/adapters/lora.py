"""One low-rank change of one layer: W' = W + (alpha / rank) · up · down (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_pipeline.errors import CorruptError


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The factors of a layer's change.

    A layer with groups shares `down` between them: each group's inputs pass through the same `down`, and each output
    channel has its own row of `up`. That is the reading under which `up · down` has the shape of the layer's weight.

    Args:
        down: (rank, in / groups) for a linear layer, (rank, in / groups, height, width) for a convolution.
        up: (out, rank) for a linear layer, (out, rank, 1, 1) for a convolution.
        alpha: Any finite number; the change is multiplied by alpha / rank.

    Raises:
        CorruptError: The shapes do not belong together, the numbers are not floating-point, or alpha is not finite.
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        fits = (
            len(down) in (2, 4)
            and len(up) == len(down)
            and up[1] == down[0]
            and set(up[2:]) <= {1}
            and 0 not in down + up
        )
        if not fits:
            problem = f"down {down} and up {up} do not belong together"
            raise CorruptError("factors", problem, "use a file with (rank, in) and (out, rank) factors of one rank")
        whole = [str(each.dtype) for each in (self.down, self.up) if not each.is_floating_point()]
        if whole:
            problem = f"are whole numbers ({whole[0].removeprefix('torch.')}), of which nobody knows the scale"
            raise CorruptError("factors", problem, "use a float32, float16, bfloat16 or float8 version of the file")
        if not math.isfinite(self.alpha):
            raise CorruptError("factors", f"alpha is {self.alpha}", "use a finite alpha")

    @property
    def rank(self) -> int:
        """Columns of `up`, rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What `up @ down` is multiplied by: alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The change of the weight: float32, (out, in / groups[, height, width])."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).reshape(self.up.shape[0], *self.down.shape[1:])

    def scaled(self, weight: float) -> LoraFactors:
        """The same factors with a change `weight` times as large; any sign, no rounding of the factors."""
        return replace(self, alpha=self.alpha * weight)

    def shaped(self, dimensions: int) -> LoraFactors:
        """For a weight of 2 or 4 dimensions: files mix linear layers and 1 x 1 convolutions, which are the same map."""
        if self.down.ndim == dimensions or self.down.shape[2:].numel() != 1:
            return self
        tail = [1] * (dimensions - 2)
        down = self.down.reshape(*self.down.shape[:2], *tail)
        return replace(self, down=down, up=self.up.reshape(*self.up.shape[:2], *tail))


def fitted(where: str, factors: LoraFactors, weight: tuple[int, ...]) -> LoraFactors:
    """The factors, shaped for a weight.

    Args:
        where: The target, for the error.
        factors: Any factors.
        weight: The shape of the layer's weight.

    Raises:
        CorruptError: Their change has another shape: they were made for another architecture.
    """
    shaped = factors.shaped(len(weight))
    change = (shaped.up.shape[0], *shaped.down.shape[1:])
    if change != weight:
        problem = f"changes a weight of shape {change}, the base's is {weight}"
        raise CorruptError(where, problem, "use the base this adapter was trained on")
    return shaped


def concatenated(parts: list[tuple[LoraFactors, float]]) -> LoraFactors:
    """Σ weight · delta as one pair of factors: no cross terms, nothing approximated.

    Args:
        parts: Factors of one layer, with their weights; any ranks, alphas and signs.

    Returns:
        Factors of the ranks' sum, with alpha = rank; the only part itself when there is one.

    Raises:
        CorruptError: The parts change weights of different shapes.
    """
    if len(parts) == 1:
        factors, weight = parts[0]
        return factors.scaled(weight)
    first = parts[0][0]
    shape = (first.up.shape[0], *first.down.shape[1:])
    parts = [(fitted("factors", factors, shape), weight) for factors, weight in parts]
    down = torch.cat([factors.down.float() for factors, _ in parts])
    up = torch.cat([factors.up.float() * (weight * factors.scale) for factors, weight in parts], dim=1)
    return LoraFactors(down, up, alpha=float(down.shape[0]))


def times_identity(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A full matrix (m, n) as a product (m, rank) · (rank, n) with an identity on its shorter side: exact."""
    rows, columns = matrix.shape
    if columns <= rows:
        return matrix, torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
    return torch.eye(rows, dtype=matrix.dtype, device=matrix.device), matrix
