"""Room for a run, on the disk and in memory, looked at before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_pipeline.pretrained.denoising import Denoiser
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.pretrained.threads import is_small
from lora_pipeline.training.checkpoints import check_space
from lora_pipeline.training.learner import Stretch
from lora_pipeline.training.memory import (
    Needs,
    activation_bytes,
    available_bytes,
    check_memory,
    learning_bytes,
    weight_bytes,
)

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams
    from lora_pipeline.pretrained.components import Components


def check_room(
    mine: Components, params: TrainParams, stretches: Sequence[Stretch], latents: tuple[int, ...], work: Path | None,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Refuses a run for which disk or memory will not do; a small base's activations are not worth looking at.

    Raises:
        ResourceError, MissingError: See `check_space` and `check_memory`.
    """
    learning = {name: each for stretch in stretches for name, each in stretch.parameters.items()}
    needed = learning_bytes(params, sum(each.numel() for each in learning.values()))
    if work is not None:
        check_space(work, needed)
    if is_small(mine.unet):
        return
    batch = params.batch_size * (2 if any(stretch.phase.prior_weight > 0 for stretch in stretches) else 1)
    kept = activation_bytes(_forward(mine, latents), batch)
    needs = Needs(weight_bytes([*mine.models.values(), mine.vae]), kept, needed)
    check_memory(needs, available_bytes(mine.unet.device), params, say)


def _forward(mine: Components, latents: tuple[int, ...]) -> Callable[[int], Tensor]:
    """So many examples through the UNet."""
    with torch.no_grad():
        prompt = encode_prompts(mine, [""])
    denoise, (channels, height, width) = Denoiser(mine), latents

    def forward(batch: int) -> Tensor:
        noisy, masked = (torch.empty(batch, count, height, width) for count in (channels, 1 + channels))
        where = mine.unet.device
        timesteps = torch.zeros(batch, dtype=torch.long, device=where)
        return denoise(noisy.to(where), timesteps, prompt[[0] * batch], masked.to(where))

    return forward
