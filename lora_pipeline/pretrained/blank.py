"""Untrained parts of a tiny Stable Diffusion, and the folder they are saved to.

Sizes are those of the embedded base: 64 x 64 pictures, 4 x 16 x 16 latents, prompts of at most 24 tokens.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

LATENT_CHANNELS = 4


def blank_autoencoder(seed: int) -> AutoencoderKL:
    """0.65 M parameters. Two channels a group at the widest level: normalising fewer wipes out flat colour."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
            sample_size=64,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    with torch.no_grad():  # a posterior of unit width drowns the first steps in noise
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -6.0
    return vae
