"""What a base goes through while it draws what each adapter does alone: the examples of learnt blends.

No pictures are needed: the noise levels, latents and prompts are those that a render of the concept would meet.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_pipeline.adapters import tokens
from lora_pipeline.adapters.composition import Part
from lora_pipeline.injection import inject
from lora_pipeline.pretrained.adapted import add_branches, add_tokens, strip
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.denoising import Denoiser
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.fit import TRAJECTORY_STEPS, Scene


@dataclass(frozen=True, eq=False)
class Moment:
    """One denoising step of some trajectories together.

    Args:
        scene: The scene's name.
        prompts: One a trajectory.
        latents: (n, channels, height, width), as the UNet gets them.
        timestep: A scalar.
        prediction: What the UNet says with each adapter of the scene alone, see `trajectory`; of the latents' shape.
    """

    scene: str
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
    mine = components.with_own_tokenizers()
    joined = tokens.joined([(name, adapter) for name, adapter, _ in parts], rename)
    try:
        add_tokens(mine, joined.embeddings, joined.embeddings_2)
        for name, adapter, _ in parts:
            add_branches(mine, adapter, name)
        yield mine
    finally:
        strip(mine)


@torch.no_grad()
def trajectory(
    components: Components, weights: Mapping[str, float], text_weights: Mapping[str, float], scene: Scene,
    prompts: Sequence[str], seed: int,
) -> Iterator[Moment]:  # fmt: skip
    """Draws without guidance what some adapters do, each alone, and tells every step.

    One adapter gives the prediction; of several it is `base + sum_i (prediction_i - base)`: what each changes when it
    is alone, together.

    Args:
        components: With all adapters, see `attached`.
        weights: Of every adapter in the UNet.
        text_weights: The same in the text encoder.
        scene: Whose adapters.
        prompts: Of the scene, one a trajectory.
        seed: Decides the noise, together with the scene's name.
    """
    voices = [Voice(components, weights, text_weights, name, prompts) for name in scene.adapters]
    base = Voice(components, weights, text_weights, None, prompts) if len(scene.adapters) > 1 else None
    scheduler = copy.deepcopy(components.scheduler)  # it counts its steps
    scheduler.set_timesteps(TRAJECTORY_STEPS)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator_for(seed, scene.name, 0, "steps")
    side = components.unet.config.sample_size
    side = side if isinstance(side, int) else max(side)
    shape = (len(prompts), components.vae.config.latent_channels, side, side)
    latents = torch.randn(shape, generator=generator_for(seed, scene.name, 0, "latents")) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, timestep)
        said = [voice(given, timestep) for voice in voices]
        prediction = said[0] if base is None else sum(said) - (len(said) - 1) * base(given, timestep)
        yield Moment(scene.name, prompts, given, timestep, prediction)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample


class Voice:
    """What the base says to some prompts with one adapter, or none."""

    def __init__(
        self, components: Components, weights: Mapping[str, float], text_weights: Mapping[str, float],
        concept: str | None, prompts: Sequence[str],
    ) -> None:  # fmt: skip
        self.unet = components.unet
        self.denoise = Denoiser(components)
        self.weights = {name: weight * (name == concept) for name, weight in weights.items()}
        own = {name: weight * (name == concept) for name, weight in text_weights.items()}
        for _, encoder in components.readers.values():
            inject.set_weights(encoder, own)
        self.conditioning = encode_prompts(components, prompts)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """(n, channels, height, width) of the latents' shape."""
        inject.set_weights(self.unet, self.weights)
        return self.denoise(latents, timestep, self.conditioning)
