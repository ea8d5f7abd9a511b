"""What a step is shown: pictures of one shape, seen one way, with their captions and the draws of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_pipeline.data.captions import shuffled
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.encodings import EncodedExample
from lora_pipeline.training.holes import drawn_holes
from lora_pipeline.training.objective import Objective
from lora_pipeline.training.order import Order
from lora_pipeline.training.phases import Phase
from lora_pipeline.training.weighting import prior_weights


@dataclass(frozen=True, eq=False)
class Batch:
    """Instances first, then priors; or one of them alone.

    Args:
        captions: One an example, empty where it was dropped.
        latents: (batch, channels, height, width).
        noise: Shaped as the latents; what the target knows.
        shown: Noise that the latents are mixed with; `noise` itself without input perturbation.
        timesteps: (batch,) int64.
        weights: (batch,), see `prior_weights`, times those of the noise levels.
        pixel_weights: (batch, 1, height, width), or None for 1 everywhere.
        instances: How many come before the priors.
        pictures: (batch, 3, height, width) in [-1, 1], for bases that inpaint; None for others.
        holes: (batch, 1, height, width) of their pixels, 1 where the base is given nothing of them; None likewise.
    """

    captions: list[str]
    latents: Tensor
    noise: Tensor
    shown: Tensor
    timesteps: Tensor
    weights: Tensor
    pixel_weights: Tensor | None
    instances: int
    pictures: Tensor | None = None
    holes: Tensor | None = None


class Sampler:
    """Draws the batches of any step of a phase; the same step always gives the same.

    Args:
        phase: With prior_weight 0 there are no priors.
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
        self.orders = {
            purpose: Order(
                ["x".join(map(str, each.mean.shape)) for each in pool],
                [each.repeats for each in pool],
                batch_size,
                seed,
                phase.name,
                purpose,
            )
            for purpose, pool in self.pools.items()
        }
        self.batch_size = batch_size
        self.objective = objective
        self.seed = seed
        counts = [batch_size, batch_size if phase.prior_weight > 0 else 0]
        self.weights = prior_weights(counts[0], counts[1], phase.prior_weight)

    def batches(self, step: int) -> list[Batch]:
        """The batch of a step, from 0, or two of them where instances and priors differ in shape; on the CPU.

        The losses of both, summed, are the step's.
        """
        examples = [example for purpose in self.pools for example in self._visited(step, purpose)]
        captions = self._captions(step, examples)
        timesteps = torch.cat([self._timesteps(step, purpose) for purpose in self.pools])
        parts = {"": slice(None)}
        if len({example.mean.shape for example in examples}) > 1:
            parts = {"": slice(self.batch_size), "priors ": slice(self.batch_size, None)}
        levels = self.objective.level_weights
        weights = self.weights if levels is None else self.weights * levels[timesteps]
        return [
            Batch(
                captions[part],
                *self._drawn(step, purpose, examples[part]),
                timesteps[part],
                weights[part],
                _pixel_weights(examples[part]),
                min(self.batch_size, len(examples[part])) if part.start is None else 0,
                *self._with_holes(step, purpose, examples[part]),
            )
            for purpose, part in parts.items()
        ]

    def _drawn(self, step: int, purpose: str, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, the noise that is asked for, and the noise that is shown."""
        mean = torch.stack([example.mean for example in examples])
        deviation = torch.stack([example.deviation for example in examples])

        def draw(name: str, shape: torch.Size) -> Tensor:
            return self._normal(step, f"{purpose}{name}", shape)

        noise, shown = self.objective.noise.drawn(mean.shape, draw)
        latents = mean + deviation * self._normal(step, f"{purpose}latents", mean.shape)
        return latents, noise, shown

    def _with_holes(
        self, step: int, purpose: str, examples: Sequence[EncodedExample]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Pictures and where they have holes, for bases that inpaint."""
        found = [example.picture for example in examples]
        pictures = [picture for picture in found if picture is not None]
        if len(pictures) < len(found):
            return None, None
        size = pictures[0].shape[-2:]
        return torch.stack(pictures), drawn_holes(len(found), size, self._generator(step, f"{purpose}holes"))

    def _visited(self, step: int, purpose: str) -> list[EncodedExample]:
        pool = self.pools[purpose]
        examples = [pool[index] for index in self.orders[purpose].pictures(step)]
        if all(example.mirrored is None for example in examples):
            return examples
        heads = torch.rand(len(examples), generator=self._generator(step, f"{purpose} mirrored")) < 0.5
        pairs = zip(examples, heads.tolist(), strict=True)
        return [example.mirrored if head and example.mirrored else example for example, head in pairs]

    def _captions(self, step: int, examples: Sequence[EncodedExample]) -> list[str]:
        captions = [example.caption for example in examples]
        if self.phase.kept_tags is not None:
            generator = self._generator(step, "shuffle")
            captions = [shuffled(caption, self.phase.kept_tags, generator) for caption in captions]
        draws = torch.rand(len(examples), generator=self._generator(step, "dropout")).tolist()
        return [
            "" if draw < self.phase.caption_dropout else caption for draw, caption in zip(draws, captions, strict=True)
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
