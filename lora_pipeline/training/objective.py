"""The objective: how far a prediction is from what the noise schedule says it should be. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.errors import CorruptError

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How latents are noised, and what the UNet is asked for.

    Args:
        signal: (T,) float32, the square root of the cumulated alphas; 0 at the end where the SNR ends at zero.
        noise: (T,) float32, sqrt(1 - signal²).
        prediction: `epsilon`, `v_prediction` or `sample`.
    """

    signal: Tensor
    noise: Tensor
    prediction: str

    @property
    def timesteps(self) -> int:
        """How many noise levels there are."""
        return len(self.signal)


def schedule_of(scheduler: Any) -> NoiseSchedule:
    """The schedule a base was trained with.

    Args:
        scheduler: A diffusers scheduler; its `alphas_cumprod` already are rescaled where its config asks for it.

    Raises:
        CorruptError: A prediction type that is not known.
    """
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        problem = f"prediction_type is {prediction!r}"
        raise CorruptError("scheduler_config.json", problem, f"use a base with one of {', '.join(PREDICTIONS)}")
    cumulated = scheduler.alphas_cumprod.double().clamp(0.0, 1.0)
    return NoiseSchedule(cumulated.sqrt().float(), (1.0 - cumulated).sqrt().float(), prediction)


def denoising_loss(
    predict: Predict,
    schedule: NoiseSchedule,
    latents: Tensor,
    conditioning: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weights: Tensor,
) -> Tensor:
    """Each example's weighted squared error.

    x_t = signal_t · x_0 + noise_t · ε (Ho et al. 2020, arXiv:2006.11239, equation 4). The target is ε, x_0, or
    v = signal_t · ε - noise_t · x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

    Args:
        predict: (noisy latents, timesteps, conditioning) -> prediction, shaped as the latents.
        schedule: The base's.
        latents: (batch, channels, height, width), x_0.
        conditioning: (batch, tokens, dim).
        noise: ε, shaped as the latents.
        timesteps: (batch,) int64.
        weights: (batch,); see `prior_weights`.

    Returns:
        (batch,) in the latents' dtype; their sum is what is minimised.
    """
    signal = schedule.signal.to(latents)[timesteps].view(-1, 1, 1, 1)
    spread = schedule.noise.to(latents)[timesteps].view(-1, 1, 1, 1)
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: signal * noise - spread * latents,
        "sample": lambda: latents,
    }[schedule.prediction]()
    prediction = predict(signal * latents + spread * noise, timesteps, conditioning)
    return weights * (prediction.to(target.dtype) - target).square().flatten(1).mean(dim=1)


def prior_weights(instances: int, priors: int, prior_weight: float) -> Tensor:
    """(instances + priors,) float32 such that the sum is mean(instances) + prior_weight · mean(priors).

    Ruiz et al. 2022 (DreamBooth), arXiv:2208.12242, equation 2.
    """
    return torch.tensor([1.0 / instances] * instances + [prior_weight / max(priors, 1)] * priors)
