"""What an inpainting UNet reads beside noisy latents: where a picture is to be made, and the rest of it.

Nine channels: noisy latents, the hole (1 where the picture is to be made), and the latents of the picture whose hole is
grey (Rombach et al. 2022, arXiv:2112.10752, section 4.5; the order is that of the published checkpoints).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_pipeline.errors import CorruptError
from lora_pipeline.pretrained.latents import encode_images, pixels_a_cell


def channels_given(unet: Any, vae: Any) -> int:
    """How many channels are read beside noisy latents: none, or those of the hole and the rest.

    Raises:
        CorruptError: Another number, as of bases that read depth or a picture to edit.
    """
    latents: int = vae.config.latent_channels
    given: int = unet.config.in_channels - latents
    if given not in (0, 1 + latents):
        problem = f"reads {unet.config.in_channels} channels, and latents have {latents}"
        fix = f"use a base of {latents} channels, or an inpainting base of {2 * latents + 1}"
        raise CorruptError("unet", problem, fix)
    return given


@torch.no_grad()
def masked(vae: Any, pictures: Tensor, holes: Tensor) -> Tensor:
    """What is given of pictures with holes.

    Args:
        vae: The base's.
        pictures: (n, 3, height, width) in [-1, 1].
        holes: (n, 1, height, width), 1 in the hole, else 0.

    Returns:
        (n, 1 + channels, height, width) of latents: a cell is a hole by its upper left pixel, as diffusers has it.
    """
    mean, _ = encode_images(vae, pictures * (1.0 - holes))
    return torch.cat([F.interpolate(holes.to(mean), size=mean.shape[-2:]), mean], dim=1)


def nothing_given(vae: Any, latents: Tensor) -> Tensor:
    """The same of a picture that is all hole, for latents (n, channels, height, width)."""
    cell = pixels_a_cell(vae)
    height, width = (cell * side for side in latents.shape[-2:])
    given = masked(vae, torch.zeros(1, 3, height, width), torch.ones(1, 1, height, width))
    return given.expand(len(latents), -1, -1, -1)
