"""The noise schedule of a base: how latents are noised, and what the UNet is asked for. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_pipeline.errors import CorruptError, ParamsError

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


def schedule_of(scheduler: Any, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """The schedule a base was trained with, or one that ends without any signal.

    Args:
        scheduler: A diffusers scheduler; its `alphas_cumprod` already are rescaled where its config asks for it.
        zero_terminal_snr: Rescale it if it is not; see `without_last_signal`.

    Raises:
        CorruptError: A prediction type that is not known.
        ParamsError: zero_terminal_snr, and the base predicts the noise: of noise alone that teaches nothing.
    """
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        problem = f"prediction_type is {prediction!r}"
        raise CorruptError("scheduler_config.json", problem, f"use a base with one of {', '.join(PREDICTIONS)}")
    if zero_terminal_snr and prediction == "epsilon":
        problem = "the base predicts the noise, and where there is nothing else that teaches it nothing"
        raise ParamsError("objective.zero_terminal_snr", problem, "set it to false, or use a v-prediction base")
    cumulated = scheduler.alphas_cumprod.double().clamp(0.0, 1.0)
    if zero_terminal_snr and not getattr(scheduler.config, "rescale_betas_zero_snr", False):
        cumulated = without_last_signal(cumulated)
    return NoiseSchedule(cumulated.sqrt().float(), (1.0 - cumulated).sqrt().float(), prediction)


def without_last_signal(cumulated: Tensor) -> Tensor:
    """Shifts and scales the signal so that the first level keeps it and the last has none.

    Lin et al. 2023, arXiv:2305.08891, algorithm 1.

    Args:
        cumulated: (T,), the cumulated alphas: the signal's squares.
    """
    signal = cumulated.sqrt()
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])).square()


def noised(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = signal_t · x_0 + noise_t · ε (Ho et al. 2020, arXiv:2006.11239, equation 4).

    Args:
        schedule: The base's.
        latents: (batch, channels, height, width), x_0.
        noise: ε, shaped as the latents.
        timesteps: (batch,) int64.
    """
    signal, spread = _at(schedule, latents, timesteps)
    return signal * latents + spread * noise


def target_of(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What is right to predict: ε, x_0, or v = signal_t · ε - noise_t · x_0 (arXiv:2202.00512, appendix D).

    The arguments are those of `noised`.
    """
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "sample":
        return latents
    signal, spread = _at(schedule, latents, timesteps)
    return signal * noise - spread * latents


def _at(schedule: NoiseSchedule, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    signal, spread = (each.to(latents)[timesteps].view(-1, 1, 1, 1) for each in (schedule.signal, schedule.noise))
    return signal, spread
