"""How much an example counts: by its noise level, and by the half of the batch it is in."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_pipeline.errors import ParamsError
from lora_pipeline.training.noising import NoiseSchedule

PLAIN, MIN_SNR, DEBIASED = "plain", "min_snr", "debiased"


def level_weights(schedule: NoiseSchedule, weighting: str, gamma: float) -> Tensor | None:
    """(T,) float32, the loss's factor at each noise level; None where it is 1 throughout.

    With SNR = signal² / noise², errors of one and the same answer are related by ‖ε̂ - ε‖² = SNR ‖x̂ - x‖² and
    ‖v̂ - v‖² = (SNR + 1) ‖x̂ - x‖² (Salimans & Ho 2022, arXiv:2202.00512, appendix D). A weight of ‖x̂ - x‖² is thus
    divided by 1, SNR or SNR + 1. That weight is
    - min_snr: min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556, section 3.4),
    - debiased: sqrt(SNR), which is 1 / sqrt(SNR) for ε (Yu et al. 2023, arXiv:2310.08442).

    Args:
        schedule: The base's.
        weighting: `plain`, `min_snr` or `debiased`.
        gamma: Of min_snr.

    Raises:
        ParamsError: The weight of a level would be infinite: debiased, for ε, where there is no signal.
    """
    if weighting == PLAIN:
        return None
    signal, noise = schedule.signal.double(), schedule.noise.double()
    snr = (signal / noise).square()
    if weighting == MIN_SNR:
        weights = {
            "epsilon": (gamma / snr).clamp_max(1.0),
            "v_prediction": torch.minimum(signal.square(), gamma * noise.square()),  # SNR + 1 is 1 / noise²
            "sample": snr.clamp_max(gamma),
        }
    else:
        weights = {"epsilon": 1.0 / snr.sqrt(), "v_prediction": signal * noise, "sample": snr.sqrt()}
    found = weights[schedule.prediction]
    if not bool(found.isfinite().all()):
        problem = f"{weighting} has an infinite weight for {schedule.prediction} at a noise level of this base"
        raise ParamsError("objective.weighting", problem, f"use {MIN_SNR}")
    return found.float()


def prior_weights(instances: int, priors: int, prior_weight: float) -> Tensor:
    """(instances + priors,) float32 such that the sum is mean(instances) + prior_weight · mean(priors).

    Ruiz et al. 2022 (DreamBooth), arXiv:2208.12242, equation 2.
    """
    return torch.tensor([1.0 / instances] * instances + [prior_weight / max(priors, 1)] * priors)
