"""Pictures to latents, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pixels_a_cell(vae: Any) -> int:
    """The side of the square of pixels that one latent cell stands for."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of `images` (n, 3, height, width) in [-1, 1], in the UNet's scale."""
    posterior = vae.encode(images.to(vae.device)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return (posterior.mean - shift) * scale, posterior.std * scale


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (n, 3, height, width) in [-1, 1] of latents in the UNet's scale."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    images: Tensor = vae.decode(latents.to(vae.device) / scale + shift).sample
    return images.clamp(-1, 1)
