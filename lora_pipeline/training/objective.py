"""What is minimised, and over which draws: the values of `objective` as one thing that the steps of a phase share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_pipeline.training.noise import NoiseShape
from lora_pipeline.training.noising import NoiseSchedule, schedule_of
from lora_pipeline.training.phases import Phase
from lora_pipeline.training.timesteps import Levels, levels_of
from lora_pipeline.training.weighting import level_weights

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams


@dataclass(frozen=True, eq=False)
class Objective:
    """The objective of a phase.

    Args:
        schedule: How latents are noised.
        levels: Which noise levels are drawn.
        noise: Which noise is drawn.
        level_weights: (T,), or None: each level's factor of the loss.
        huber_delta: See `distances`; None for squares.
    """

    schedule: NoiseSchedule
    levels: Levels
    noise: NoiseShape
    level_weights: Tensor | None
    huber_delta: float | None


def objective_of(params: TrainParams, phase: Phase, scheduler: Any) -> Objective:
    """What a phase minimises.

    Raises:
        ParamsError, CorruptError: See `schedule_of`, `levels_of` and `level_weights`.
    """
    asked = params.objective
    schedule = schedule_of(scheduler, asked.zero_terminal_snr)
    logit_normal = asked.timesteps == "logit_normal"
    return Objective(
        schedule,
        levels_of(phase.window, schedule.timesteps, logit_normal, f"{phase.name}.timesteps"),
        NoiseShape(asked.offset_noise, asked.pyramid_noise, asked.input_perturbation),
        level_weights(schedule, asked.weighting, asked.snr_gamma),
        asked.huber_delta if asked.loss == "huber" else None,
    )


def distances(prediction: Tensor, target: Tensor, huber_delta: float | None, pixel_weights: Tensor | None) -> Tensor:
    """How far each prediction is from its target.

    The mean of squares e², or of the pseudo-Huber 2 δ² (sqrt(1 + (e / δ)²) - 1), which is e² where e is far below δ and
    2 δ |e| where it is far above, and smooth between them (Charbonnier et al. 1997; for diffusion: Khrapov et al. 2024,
    arXiv:2403.16728).

    Args:
        prediction: (batch, channels, height, width).
        target: Shaped as the prediction.
        huber_delta: δ, or None for squares.
        pixel_weights: (batch, 1, height, width), see `masking.pixel_weights`; None for 1 everywhere.

    Returns:
        (batch,) in the target's dtype.
    """
    distance = (prediction.to(target.dtype) - target).square()
    if huber_delta is not None:  # the same as above without its cancellation
        distance = 2.0 * distance / ((1.0 + distance / huber_delta**2).sqrt() + 1.0)
    if pixel_weights is not None:
        distance = distance * pixel_weights
    return distance.flatten(1).mean(dim=1)
