"""The loss of a batch and of a step: what the UNet says, against what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lora_pipeline.injection.chance import Chance
from lora_pipeline.pretrained.adapted import set_weights
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.denoising import Denoiser
from lora_pipeline.pretrained.inpainting import masked
from lora_pipeline.training.batches import Batch, Sampler
from lora_pipeline.training.conditioning import Condition
from lora_pipeline.training.learner import LossAt
from lora_pipeline.training.noising import noised, target_of
from lora_pipeline.training.objective import Objective, distances
from lora_pipeline.training.placement import moved

BRANCH = "tuned"
Anchor = Callable[[Tensor, Tensor, Sequence[str], Tensor | None], Tensor]
LossIn = Callable[[Batch], Tensor]


def base_prediction(base: Components, condition: Condition) -> Anchor:
    """What the base itself says of noisy latents, timesteps, captions and what is given of pictures with holes.

    Args:
        base: With what is learnt beside its layers, which is switched off meanwhile, or untouched.
        condition: Captions to what its UNet reads.
    """
    denoise = Denoiser(base)

    @torch.no_grad()
    def anchor(noisy: Tensor, timesteps: Tensor, captions: Sequence[str], given: Tensor | None) -> Tensor:
        try:
            set_weights(base, {BRANCH: 0.0})
            return denoise(noisy, timesteps, condition(captions), given)
        finally:
            set_weights(base, {BRANCH: 1.0})

    return anchor


def batch_loss(mine: Components, objective: Objective, condition: Condition, anchor: Anchor | None) -> LossIn:
    """The loss of a batch: instances and priors go through the UNet together.

    Args:
        mine: The base, with what is learnt.
        objective: What is minimised.
        condition: Captions to what the UNet reads.
        anchor: Gives the priors' targets; None where they are those of their pictures.
    """
    schedule, denoise = objective.schedule, Denoiser(mine)

    def loss_in(given: Batch) -> Tensor:
        batch = moved(given, mine.unet.device)
        noisy = noised(schedule, batch.latents, batch.shown, batch.timesteps)
        target = target_of(schedule, batch.latents, batch.noise, batch.timesteps)
        own, rest = batch.instances, _given(mine, batch)
        if anchor is not None and own < len(batch.captions):
            rest_of = None if rest is None else rest[own:]
            said = anchor(noisy[own:], batch.timesteps[own:], batch.captions[own:], rest_of)
            target = torch.cat([target[:own], said.to(target)])
        prediction = denoise(noisy, batch.timesteps, condition(batch.captions), rest)
        return (batch.weights * distances(prediction, target, objective.huber_delta, batch.pixel_weights)).sum()

    return loss_in


def _given(mine: Components, batch: Batch) -> Tensor | None:
    """What an inpainting base is given of the pictures; None of other bases."""
    if batch.pictures is None or batch.holes is None:
        return None
    return masked(mine.vae, batch.pictures, batch.holes)


def loss_of(loss_in: LossIn, sampler: Sampler, chance: Chance | None = None) -> LossAt:
    """The loss of a step's batch, by its number.

    Its backward pass may compute parts of it again, so that `chance` goes on with this batch until the next, or until
    somebody looks at what was learnt.
    """

    def loss_at(step: int) -> Tensor:
        if chance is not None:
            chance.batch = step
        first, *others = [loss_in(batch) for batch in sampler.batches(step)]
        return sum(others, first)

    return loss_at


@torch.no_grad()
def seen(loss_in: LossIn, batches: Iterable[Batch]) -> float:
    """The losses' sum."""
    return sum(float(loss_in(batch)) for batch in batches)
