"""Holes that an inpainting base learns to fill: the whole picture, boxes and ellipses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WHOLE = 0.25  # of all holes, as Stable Diffusion's own inpainting model learnt them (its model card)
SMALLEST = 0.25  # side of a hole, as a share of the picture's


def drawn_holes(count: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Holes of every kind at random places.

    Args:
        count: Of pictures.
        size: Their height and width.
        generator: Decides all; the same number of values is drawn for every picture.

    Returns:
        (count, 1, height, width) float32, 1 in the hole, else 0. A quarter are the whole picture; of the rest half are
        boxes and half ellipses, whose sides are a quarter of the picture's to all of it.
    """
    height, width = size
    draws = torch.rand(count, 6, generator=generator, dtype=torch.float64)
    whole, ellipse = draws[:, 0] < WHOLE, draws[:, 1] < 0.5
    down = _distances(height, draws[:, 2], draws[:, 4])[:, :, None]
    across = _distances(width, draws[:, 3], draws[:, 5])[:, None, :]
    boxes = torch.maximum(down, across) <= 1.0
    rounds = down.square() + across.square() <= 1.0
    holes = torch.where(ellipse[:, None, None], rounds, boxes) | whole[:, None, None]
    return holes[:, None].float()


def _distances(side: int, sizes: Tensor, places: Tensor) -> Tensor:
    """(count, side): how far each pixel's middle is from the hole's, in halves of the hole."""
    half = (SMALLEST + (1.0 - SMALLEST) * sizes) / 2.0
    middle = half + (1.0 - 2.0 * half) * places
    pixels = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return (pixels - middle[:, None]).abs() / half[:, None]
