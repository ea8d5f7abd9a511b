"""What a step is shown: examples with their latents' distributions, and the draws of one step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.data.dataset import Example, load_pixels
from lora_pipeline.data.masks import load_masks
from lora_pipeline.pretrained.encoding import encode_images
from lora_pipeline.training.draws import batch_indices, generator_for
from lora_pipeline.training.masking import pixel_weights
from lora_pipeline.training.objective import Objective
from lora_pipeline.training.phases import Phase
from lora_pipeline.training.weighting import prior_weights

_PICTURES_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """An example as the UNet knows it.

    Args:
        caption: What the picture shows.
        mean: (channels, height, width), of the latents' distribution.
        deviation: Shaped as the mean; every visit draws afresh, as the encoder's own noise is part of the data.
        pixel_weights: (1, height, width), or None for 1 everywhere; see `masking.pixel_weights`.
    """

    caption: str
    mean: Tensor
    deviation: Tensor
    pixel_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Instances first, then priors.

    Args:
        captions: One an example, empty where it was dropped.
        latents: (batch, channels, height, width).
        noise: Shaped as the latents; what the target knows.
        shown: Noise that the latents are mixed with; `noise` itself without input perturbation.
        timesteps: (batch,) int64.
        weights: (batch,), see `prior_weights`, times those of the noise levels.
        pixel_weights: (batch, 1, height, width), or None for 1 everywhere.
        instances: How many come before the priors.
    """

    captions: list[str]
    latents: Tensor
    noise: Tensor
    shown: Tensor
    timesteps: Tensor
    weights: Tensor
    pixel_weights: Tensor | None
    instances: int


@torch.no_grad()
def encode_examples(vae: Any, examples: Sequence[Example], background: float | None = None) -> list[EncodedExample]:
    """Runs the autoencoder once over all pictures.

    Args:
        vae: The base's.
        examples: Pictures.
        background: What lies outside their masks weighs, in [0, 1]; None pays no heed to masks.

    Raises:
        CorruptError: A picture or mask cannot be read, or is of another size than the rest.
    """
    encoded: list[EncodedExample] = []
    for start in range(0, len(examples), _PICTURES_AT_ONCE):
        some = examples[start : start + _PICTURES_AT_ONCE]
        pixels = load_pixels(some)
        means, deviations = encode_images(vae, pixels)
        weights: Sequence[Tensor | None] = [None] * len(some)
        if background is not None:
            masks = load_masks(some, (pixels.shape[-1], pixels.shape[-2]))
            weights = list(pixel_weights(masks, (means.shape[-2], means.shape[-1]), background))
        captions = [example.caption for example in some]
        encoded += map(EncodedExample, captions, means.clone(), deviations.clone(), weights)
    return encoded


def anchors_of(instances: Sequence[EncodedExample], token: str) -> list[EncodedExample]:
    """What stands for class pictures where there are none: one's own, whose captions do not name the concept.

    Good only where the target is what the base itself says of them.

    Args:
        instances: One's own pictures.
        token: The placeholder, which is taken out of their captions.
    """
    pattern = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", flags=re.IGNORECASE)
    captions = [" ".join(pattern.sub(" ", each.caption).split()) for each in instances]
    return [
        EncodedExample(caption, each.mean, each.deviation) for caption, each in zip(captions, instances, strict=True)
    ]


class Sampler:
    """Draws the batch of any step of a phase; the same step always gives the same batch.

    Args:
        phase: With prior_weight 0 the batch has no priors.
        pools: Instances and priors.
        batch_size: Of each of them.
        objective: Of the phase; says which noise and noise levels are drawn.
        seed: All draws depend on it.
    """

    def __init__(
        self,
        phase: Phase,
        pools: tuple[Sequence[EncodedExample], Sequence[EncodedExample]],
        batch_size: int,
        objective: Objective,
        seed: int,
    ) -> None:
        self.phase = phase
        self.pools = {"instances": pools[0]} | ({"priors": pools[1]} if phase.prior_weight > 0 else {})
        self.batch_size = batch_size
        self.objective = objective
        self.seed = seed
        counts = [batch_size, batch_size if phase.prior_weight > 0 else 0]
        self.weights = prior_weights(counts[0], counts[1], phase.prior_weight)

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0; all tensors on the CPU."""
        examples = [example for purpose in self.pools for example in self._visited(step, purpose)]
        mean = torch.stack([example.mean for example in examples])
        deviation = torch.stack([example.deviation for example in examples])
        noise, shown = self.objective.noise.drawn(mean.shape, partial(self._normal, step))
        timesteps = torch.cat([self._timesteps(step, purpose) for purpose in self.pools])
        levels = self.objective.level_weights
        return Batch(
            captions=self._captions(step, examples),
            latents=mean + deviation * self._normal(step, "latents", mean.shape),
            noise=noise,
            shown=shown,
            timesteps=timesteps,
            weights=self.weights if levels is None else self.weights * levels[timesteps],
            pixel_weights=_pixel_weights(examples),
            instances=self.batch_size,
        )

    def _visited(self, step: int, purpose: str) -> list[EncodedExample]:
        pool = self.pools[purpose]
        return [pool[i] for i in batch_indices(len(pool), self.batch_size, step, self.seed, self.phase.name, purpose)]

    def _captions(self, step: int, examples: Sequence[EncodedExample]) -> list[str]:
        draws = torch.rand(len(examples), generator=self._generator(step, "dropout")).tolist()
        return [
            "" if draw < self.phase.caption_dropout else example.caption
            for draw, example in zip(draws, examples, strict=True)
        ]

    def _timesteps(self, step: int, purpose: str) -> Tensor:
        return self.objective.levels.drawn(self.batch_size, self._generator(step, f"{purpose} timesteps"))

    def _normal(self, step: int, purpose: str, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator(step, purpose))

    def _generator(self, step: int, purpose: str) -> torch.Generator:
        return generator_for(self.seed, self.phase.name, step, purpose)


def _pixel_weights(examples: Sequence[EncodedExample]) -> Tensor | None:
    found = [example.pixel_weights for example in examples]
    if all(weights is None for weights in found):
        return None
    ones = torch.ones(1, *examples[0].mean.shape[-2:])
    return torch.stack([ones if weights is None else weights for weights in found])
