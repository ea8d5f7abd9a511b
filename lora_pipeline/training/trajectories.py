"""What a base with one adapter goes through while it draws that adapter's prompts: the examples of learned blends.

No pictures are needed: the noise levels, latents and prompts are those that a render of the concept would meet.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_pipeline.adapters import tokens
from lora_pipeline.adapters.composition import Part
from lora_pipeline.adapters.targets import TEXT_ENCODER, UNET
from lora_pipeline.injection import inject
from lora_pipeline.injection.tokens import add_placeholder
from lora_pipeline.injection.tokens import remove as remove_tokens
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.fit import TRAJECTORY_STEPS


@dataclass(frozen=True, eq=False)
class Moment:
    """One denoising step of some trajectories together.

    Args:
        concept: The adapter whose prompts are drawn.
        prompts: One a trajectory.
        latents: (n, channels, height, width), as the UNet gets them.
        timestep: A scalar.
        prediction: What the UNet says with that adapter alone, of the latents' shape.
    """

    concept: str
    prompts: Sequence[str]
    latents: Tensor
    timestep: Tensor
    prediction: Tensor


@contextmanager
def attached(components: Components, parts: Sequence[Part], rename: bool) -> Iterator[Components]:
    """Inside, a base with all adapters and their tokens; afterwards nothing is left in its models.

    Raises:
        CorruptError, ParamsError: See `inject_adapter`, `tokens.joined` and `add_placeholder`.
    """
    mine = replace(components, tokenizer=copy.deepcopy(components.tokenizer))
    rows = tokens.joined([(name, adapter) for name, adapter, _ in parts], rename).embeddings
    try:
        for token, each in rows.items():
            add_placeholder(mine.tokenizer, mine.text_encoder, token, each)
        for name, adapter, _ in parts:
            inject.inject_adapter(mine.unet, UNET, adapter, name)
            inject.inject_adapter(mine.text_encoder, TEXT_ENCODER, adapter, name)
        yield mine
    finally:
        inject.remove(mine.unet)
        inject.remove(mine.text_encoder)
        remove_tokens(mine.text_encoder)


@torch.no_grad()
def trajectory(
    components: Components, weights: Mapping[str, float], text_weights: Mapping[str, float], concept: str,
    prompts: Sequence[str], seed: int,
) -> Iterator[Moment]:  # fmt: skip
    """Draws with one adapter alone, without guidance, and tells every step.

    Args:
        components: With all adapters, see `attached`.
        weights: Of every adapter in the UNet; the concept's own is its strength.
        text_weights: The same in the text encoder.
        concept: The adapter that is switched on.
        prompts: One a trajectory.
        seed: Decides the noise, together with the concept.
    """
    inject.set_weights(components.unet, {name: weight * (name == concept) for name, weight in weights.items()})
    inject.set_weights(components.text_encoder, {name: w * (name == concept) for name, w in text_weights.items()})
    states = encode_prompts(components, prompts)
    scheduler = copy.deepcopy(components.scheduler)  # it counts its steps
    scheduler.set_timesteps(TRAJECTORY_STEPS)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator_for(seed, concept, 0, "steps")
    config = components.unet.config
    side = config.sample_size if isinstance(config.sample_size, int) else max(config.sample_size)
    shape = (len(prompts), config.in_channels, side, side)
    latents = torch.randn(shape, generator=generator_for(seed, concept, 0, "latents")) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, timestep)
        prediction = components.unet(given, timestep, states).sample
        yield Moment(concept, prompts, given, timestep, prediction)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
