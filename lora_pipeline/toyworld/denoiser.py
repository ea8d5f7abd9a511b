"""Training the embedded base's text encoder and UNet together on cached latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_pipeline.toyworld.fitting import Average, Recipe, Report, fit, step_generator
from lora_pipeline.toyworld.muon import Muon

CAPTION_DROPOUT = 0.1

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        states = self.text_encoder(tokens).last_hidden_state
        prediction: Tensor = self.unet(noisy, timesteps, states).sample
        return prediction


def velocity_loss(predict: Predict, latents: Latents, alphas: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity `v = sqrt(a) e - sqrt(1 - a) x` (Salimans & Ho 2022) at random timesteps.

    alphas: (1000,) cumulative products of the noise schedule. Timesteps are stratified over the batch, which removes
    most of the loss's variance between batches.
    """
    count = len(rows)
    unit = torch.randn((2, count, *latents.mean.shape[1:]), generator=generator)
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (strata * len(alphas)).long()
    tokens = latents.tokens[rows]
    unsaid = torch.rand(count, generator=generator) < CAPTION_DROPOUT
    tokens = torch.where(unsaid[:, None], latents.empty, tokens)
    clean = latents.mean[rows].float() + latents.deviation[rows].float() * unit[0]
    signal = alphas[timesteps].sqrt()[:, None, None, None]
    noise = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
    prediction = predict(signal * clean + noise * unit[1], timesteps, tokens)
    return (prediction - (signal * unit[1] - noise * clean)).square().mean()


def train_denoiser(
    model: nn.Module, latents: Latents, alphas: Tensor, recipe: Recipe, checkpoint: Path, report: Report,
    predict: Predict | None = None,
) -> Average:  # fmt: skip
    """Fit `model` (through `predict`, its compiled form, where given); returns the averaged weights."""

    def loss_at(step: int) -> Tensor:
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(latents.mean), (recipe.batch,), generator=generator)
        return velocity_loss(predict or model, latents, alphas, rows, generator)

    return fit(model, loss_at, recipe, checkpoint, report, make_optimiser=Muon)
