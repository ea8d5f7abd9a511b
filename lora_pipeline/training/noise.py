"""The noise that latents are mixed with: white, or with more of it in what is coarse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Draw = Callable[[str, torch.Size], Tensor]


@dataclass(frozen=True)
class NoiseShape:
    """What is added to white noise.

    Args:
        offset: Strength of a value for each whole channel (Guttenberg 2023, "Diffusion with Offset Noise"); 0 is none.
        pyramid: Weight of each coarser level against the next finer one, in [0, 1); 0 is none. See `pyramid_noise`.
        perturbation: Strength of noise that is in the UNet's input and not in its target (Ning et al. 2023,
            arXiv:2301.11706); 0 is none.
    """

    offset: float
    pyramid: float
    perturbation: float

    def drawn(self, shape: torch.Size, draw: Draw) -> tuple[Tensor, Tensor]:
        """Noise as the target knows it, and as it is in the input; one tensor where they do not differ.

        Args:
            shape: (batch, channels, height, width), of both.
            draw: Standard normal values for a purpose and a shape; the same for the same purpose.
        """
        noise = pyramid_noise(shape, self.pyramid, draw) if self.pyramid else draw("noise", shape)
        if self.offset:
            noise = noise + self.offset * draw("offset noise", torch.Size((*shape[:2], 1, 1)))
        if not self.perturbation:
            return noise, noise
        return noise, noise + self.perturbation * draw("input perturbation", shape)


def pyramid_noise(shape: torch.Size, discount: float, draw: Draw) -> Tensor:
    """Noise of several resolutions (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training").

    Level i has one value for each block of 2^i by 2^i, weighs discount^i, and the last has one for the shorter side.
    As blocks are not blurred, the sum can be scaled so that every single value keeps the variance 1.

    Args:
        shape: (batch, channels, height, width).
        discount: Above 0, below 1.
        draw: See `NoiseShape.drawn`.
    """
    height, width = shape[-2:]
    noise, variance = draw("noise", shape), 1.0
    for level in range(1, (min(height, width) - 1).bit_length() + 1):
        block = 2**level
        coarse = draw(f"noise {level}", torch.Size((*shape[:2], -(-height // block), -(-width // block))))
        fine = coarse.repeat_interleave(block, dim=-2)[..., :height, :]
        noise = noise + discount**level * fine.repeat_interleave(block, dim=-1)[..., :width]
        variance += discount ** (2 * level)
    return noise / math.sqrt(variance)
