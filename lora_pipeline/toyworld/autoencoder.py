"""Training the embedded base's autoencoder: pictures to 4 x 16 x 16 latents of zero mean and unit variance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_pipeline.pretrained.blank import AutoencoderKL
from lora_pipeline.toyworld.fitting import Recipe, Report, fit, load_weights, plain, step_generator

KL_WEIGHT = 1e-6
EDGE_WEIGHT = 0.5
SMALLEST_DEVIATION = 0.05  # a latent direction that died is not blown up to unit variance


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (n, 64, 64, 3) to float32 (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1


def reconstruction_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + MSE + half the L1 of the pixel differences (edges), and a little KL to keep latents finite."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator=generator)).sample
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum(dim=(1, 2, 3)).mean()
    loss: Tensor = error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl
    return loss


def train_autoencoder(vae: AutoencoderKL, pixels: np.ndarray, recipe: Recipe, checkpoint: Path, report: Report) -> None:
    """Fit `vae` to uint8 `pixels` (n, 64, 64, 3), then give its latents zero mean and unit variance."""

    def loss_at(step: int) -> Tensor:
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(pixels), (recipe.batch,), generator=generator)
        return reconstruction_loss(vae, to_tensor(pixels[rows.sort().values.numpy()]), generator)

    average = fit(vae, plain(loss_at), recipe, checkpoint, report)
    load_weights(vae, average.weights)
    whiten(vae, to_tensor(pixels[:: max(1, len(pixels) // 2000)]))


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Rotate the latents to their principal axes and scale each to unit variance, inside the quant convolutions.

    `z' = S R (z - m)`; the encoder's last 1x1 convolution takes the map, the decoder's first one its inverse. A 1x1
    convolution mixes channels before the posterior is sampled, so log-variances move by `2 log S` only; rotating the
    noise of unequal widths is not a diagonal Gaussian any more, and the widest is taken (they are all tiny).
    """
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(100)])
    flat = means.permute(1, 0, 2, 3).flatten(1).double()
    centre = flat.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh((flat - centre) @ (flat - centre).T / flat.shape[1])
    deviation = values.clamp_min(0).sqrt().clamp_min(SMALLEST_DEVIATION)
    forward = (vectors / deviation).T
    backward = vectors * deviation
    channels = len(centre)
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:, :, 0, 0].double(), quant.bias.double()
    mean_weight, mean_bias = forward @ weight[:channels], forward @ (bias[:channels, None] - centre)[:, 0]
    quant.weight[:channels, :, 0, 0], quant.bias[:channels] = mean_weight.float(), mean_bias.float()
    quant.bias[channels:] -= 2 * deviation.log().float()
    weight, bias = post.weight[:, :, 0, 0].double(), post.bias.double()
    post.weight[:, :, 0, 0] = (weight @ backward).float()
    post.bias.copy_((bias + weight @ centre[:, 0]).float())


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio of reconstructions from posterior means, dB."""
    decoded = torch.cat([vae.decode(vae.encode(b).latent_dist.mode()).sample.clamp(-1, 1) for b in images.split(100)])
    return float(-10 * (((decoded - images) / 2) ** 2).mean().log10())


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """Pictures through the autoencoder and back: uint8 (n, 64, 64, 3) to the same."""
    rebuilt = []
    for start in range(0, len(pixels), 100):
        latents = vae.encode(to_tensor(pixels[start : start + 100])).latent_dist.mode()
        images = vae.decode(latents).sample.clamp(-1, 1)
        rebuilt.append(((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(rebuilt)
