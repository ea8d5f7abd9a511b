"""The loss of a batch and of a step: what the UNet says, against what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from lora_pipeline.injection import inject
from lora_pipeline.pretrained.components import Components
from lora_pipeline.training.batches import Batch, Sampler
from lora_pipeline.training.conditioning import Condition
from lora_pipeline.training.learner import LossAt
from lora_pipeline.training.noising import noised, target_of
from lora_pipeline.training.objective import Objective, distances
from lora_pipeline.training.placement import moved

BRANCH = "tuned"
Anchor = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
LossIn = Callable[[Batch], Tensor]


def predictor(mine: Components) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The UNet as a function of noisy latents, timesteps and conditioning."""

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        noisy = noisy.to(conditioning.dtype).contiguous(memory_format=torch.channels_last)
        return cast(Tensor, mine.unet(noisy, timesteps, conditioning, return_dict=False)[0])

    return predict


def base_prediction(base: Components, condition: Condition) -> Anchor:
    """What the base itself says of noisy latents, timesteps and captions, with what is learnt switched off.

    Args:
        base: With what is learnt beside its layers, or untouched.
        condition: Captions to what its UNet reads.
    """
    predict = predictor(base)

    @torch.no_grad()
    def anchor(noisy: Tensor, timesteps: Tensor, captions: Sequence[str]) -> Tensor:
        models = (base.unet, base.text_encoder)
        try:
            for model in models:
                inject.set_weights(model, {BRANCH: 0.0})
            return predict(noisy, timesteps, condition(captions))
        finally:
            for model in models:
                inject.set_weights(model, {BRANCH: 1.0})

    return anchor


def batch_loss(mine: Components, objective: Objective, condition: Condition, anchor: Anchor | None) -> LossIn:
    """The loss of a batch: instances and priors go through the UNet together.

    Args:
        mine: The base, with what is learnt.
        objective: What is minimised.
        condition: Captions to what the UNet reads.
        anchor: Gives the priors' targets; None where they are those of their pictures.
    """
    schedule, predict = objective.schedule, predictor(mine)

    def loss_in(given: Batch) -> Tensor:
        batch = moved(given, mine.unet.device)
        noisy = noised(schedule, batch.latents, batch.shown, batch.timesteps)
        target = target_of(schedule, batch.latents, batch.noise, batch.timesteps)
        own = batch.instances
        if anchor is not None and own < len(batch.captions):
            said = anchor(noisy[own:], batch.timesteps[own:], batch.captions[own:])
            target = torch.cat([target[:own], said.to(target)])
        prediction = predict(noisy, batch.timesteps, condition(batch.captions))
        return (batch.weights * distances(prediction, target, objective.huber_delta, batch.pixel_weights)).sum()

    return loss_in


def loss_of(loss_in: LossIn, sampler: Sampler) -> LossAt:
    """The loss of a step."""

    def loss_at(step: int) -> Tensor:
        first, *others = [loss_in(batch) for batch in sampler.batches(step)]
        return sum(others, first)

    return loss_at


@torch.no_grad()
def seen(loss_in: LossIn, batches: Iterable[Batch]) -> float:
    """The losses' sum."""
    return sum(float(loss_in(batch)) for batch in batches)
