"""What a step is shown: examples with their latents' distributions, and the draws of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.data.dataset import Example, load_pixels
from lora_pipeline.pretrained.encoding import encode_images
from lora_pipeline.training.draws import batch_indices, generator_for, spread_timesteps
from lora_pipeline.training.objective import prior_weights
from lora_pipeline.training.phases import Phase

_PICTURES_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """An example as the UNet knows it.

    Args:
        caption: What the picture shows.
        mean: (channels, height, width), of the latents' distribution.
        deviation: Shaped as the mean; every visit draws afresh, as the encoder's own noise is part of the data.
    """

    caption: str
    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Instances first, then priors.

    Args:
        captions: One an example, empty where it was dropped.
        latents: (batch, channels, height, width).
        noise: Shaped as the latents.
        timesteps: (batch,) int64.
        weights: (batch,), see `prior_weights`.
    """

    captions: list[str]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor


@torch.no_grad()
def encode_examples(vae: Any, examples: Sequence[Example]) -> list[EncodedExample]:
    """Runs the autoencoder once over all pictures.

    Raises:
        CorruptError: A picture cannot be read, or is of another size than the rest.
    """
    encoded: list[EncodedExample] = []
    for start in range(0, len(examples), _PICTURES_AT_ONCE):
        some = examples[start : start + _PICTURES_AT_ONCE]
        means, deviations = encode_images(vae, load_pixels(some))
        encoded += map(EncodedExample, [example.caption for example in some], means.clone(), deviations.clone())
    return encoded


class Sampler:
    """Draws the batch of any step of a phase; the same step always gives the same batch.

    Args:
        phase: With prior_weight 0 the batch has no priors.
        pools: Instances and priors.
        batch_size: Of each of them.
        timesteps: Of the noise schedule.
        seed: All draws depend on it.
    """

    def __init__(
        self,
        phase: Phase,
        pools: tuple[Sequence[EncodedExample], Sequence[EncodedExample]],
        batch_size: int,
        timesteps: int,
        seed: int,
    ) -> None:
        self.phase = phase
        self.pools = {"instances": pools[0]} | ({"priors": pools[1]} if phase.prior_weight > 0 else {})
        self.batch_size = batch_size
        self.timesteps = timesteps
        self.seed = seed
        counts = [batch_size, batch_size if phase.prior_weight > 0 else 0]
        self.weights = prior_weights(counts[0], counts[1], phase.prior_weight)

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0; all tensors on the CPU."""
        examples = [example for purpose in self.pools for example in self._visited(step, purpose)]
        mean = torch.stack([example.mean for example in examples])
        deviation = torch.stack([example.deviation for example in examples])
        return Batch(
            captions=self._captions(step, examples),
            latents=mean + deviation * self._normal(step, "latents", mean.shape),
            noise=self._normal(step, "noise", mean.shape),
            timesteps=torch.cat([self._timesteps(step, purpose) for purpose in self.pools]),
            weights=self.weights,
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
        return spread_timesteps(self.batch_size, self.timesteps, self._generator(step, f"{purpose} timesteps"))

    def _normal(self, step: int, purpose: str, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator(step, purpose))

    def _generator(self, step: int, purpose: str) -> torch.Generator:
        return generator_for(self.seed, self.phase.name, step, purpose)
