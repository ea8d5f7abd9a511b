"""One optimiser for all phases: AdamW with a short warm-up, clipped gradients and a guard on token rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_pipeline.training.phases import INVERSION, Phase

CLIP_NORM = 1.0
WARM_UP_SHARE = 0.05
WEIGHT_DECAY = 0.01


def make_optimiser(phase: Phase, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101); token rows are not decayed, zero is no meaning."""
    decay = 0.0 if phase.name == INVERSION else WEIGHT_DECAY
    return torch.optim.AdamW(
        list(parameters), lr=phase.learning_rate, betas=(0.9, 0.99), weight_decay=decay, fused=True
    )


def learning_rate(phase: Phase, step: int) -> float:
    """A linear warm-up over the first twentieth of the phase, then the phase's rate."""
    warm_up = max(1, round(WARM_UP_SHARE * phase.steps))
    return phase.learning_rate * min(1.0, (step + 1) / warm_up)


@torch.no_grad()
def guard_norms(rows: Tensor, largest: float) -> None:
    """Shortens, in place, rows longer than any word the text encoder knows; beyond them it was never trained.

    Args:
        rows: (vectors, dim).
        largest: The largest norm among the base's own rows.
    """
    rows.mul_((largest / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0))


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """The optimiser's state by `<parameter>/<entry>`; names come in its parameters' order."""
    state = optimiser.state_dict()["state"]
    named = {name: state.get(index, {}) for index, name in enumerate(names)}
    return {f"{name}/{entry}": tensor for name, entries in named.items() for entry, tensor in entries.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """The opposite of `optimiser_tensors`."""
    index = {name: place for place, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(index[name], {})[entry] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
