"""Training the embedded base's text encoder and UNet together on cached latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_pipeline.toyworld.fitting import Average, Recipe, Report, fit, step_generator
from lora_pipeline.toyworld.muon import Muon
from lora_pipeline.toyworld.replicas import Replicas

CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Latents:
    """Encoded pictures with their tokenised captions.

    mean, deviation: float16 (n, 4, 16, 16), the posterior of each picture. tokens: int64 (n, 24). empty: int64 (24,),
    the tokens of no caption.
    """

    mean: Tensor
    deviation: Tensor
    tokens: Tensor
    empty: Tensor


class Denoiser(nn.Module):
    """Text encoder and UNet as one model: noisy latents, timesteps and tokens to the prediction."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Noisy (n, 4, 16, 16), timesteps (n,), tokens (n, 24); returns a prediction shaped like `noisy`."""
        states = self.text_encoder(tokens).last_hidden_state
        prediction: Tensor = self.unet(noisy, timesteps, states).sample
        return prediction


@dataclass(frozen=True)
class Noised:
    """A batch: noisy latents (n, 4, 16, 16), timesteps (n,), tokens (n, 24), velocities like the latents."""

    noisy: Tensor
    timesteps: Tensor
    tokens: Tensor
    velocity: Tensor

    def part(self, rows: slice) -> Noised:
        """The pictures that `rows` selects."""
        return Noised(self.noisy[rows], self.timesteps[rows], self.tokens[rows], self.velocity[rows])


def noised(latents: Latents, alphas: Tensor, rows: Tensor, generator: torch.Generator) -> Noised:
    """Pictures `rows` at random timesteps, and their velocity `v = sqrt(a) e - sqrt(1 - a) x` (Salimans & Ho 2022).

    alphas: (1000,) cumulative products of the noise schedule. Timesteps are stratified over the batch, which removes
    most of the loss's variance between batches.
    """
    count = len(rows)
    unit = torch.randn((2, count, *latents.mean.shape[1:]), generator=generator)
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (strata * len(alphas)).long()
    unsaid = torch.rand(count, generator=generator) < CAPTION_DROPOUT
    tokens = torch.where(unsaid[:, None], latents.empty, latents.tokens[rows])
    clean = latents.mean[rows].float() + latents.deviation[rows].float() * unit[0]
    signal = alphas[timesteps].sqrt()[:, None, None, None]
    noise = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
    return Noised(signal * clean + noise * unit[1], timesteps, tokens, signal * unit[1] - noise * clean)


def velocity_loss(model: nn.Module, batch: Noised) -> Tensor:
    """Mean squared error of the predicted velocity."""
    error: Tensor = model(batch.noisy, batch.timesteps, batch.tokens) - batch.velocity
    return error.square().mean()


def train_denoiser(
    model: nn.Module, latents: Latents, alphas: Tensor, recipe: Recipe, checkpoint: Path, report: Report, shards: int,
) -> Average:  # fmt: skip
    """Fit `model` with its batches cut in `shards` equal parts, a thread each; returns the averaged weights."""
    share = recipe.batch // shards

    with Replicas(model, shards) as replicas:

        def backward(step: int) -> float:
            generator = step_generator(recipe.seed, step)
            rows = torch.randint(len(latents.mean), (share * shards,), generator=generator)
            batch = noised(latents, alphas, rows, generator)
            # Every shard sees all noise levels: strata run along the batch, so shards take every n-th picture.
            return replicas.backward(lambda replica, n: velocity_loss(replica, batch.part(slice(n, None, shards))))

        return fit(model, backward, recipe, checkpoint, report, make_optimiser=Muon)
