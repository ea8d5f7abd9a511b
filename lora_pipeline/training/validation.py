"""How well it goes on pictures that are not learnt from: always the same pictures, noise and noise levels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lora_pipeline.adapters.storage import written_whole
from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.training.batches import Batch
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.encodings import EncodedExample
from lora_pipeline.training.holes import drawn_holes
from lora_pipeline.training.loop import Report, StepLoss
from lora_pipeline.training.phases import Phase

METRIC = "validation_loss"
LEVELS = 8
_NAME = "validation.json"
T = TypeVar("T")


def set_aside(examples: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """Those that are learnt from, and `count` that are not; which is drawn from the seed.

    Raises:
        ParamsError: None would be left to learn from.
    """
    if count >= len(examples):
        problem = f"{count} of {len(examples)} pictures would be set aside, and none left to learn from"
        raise ParamsError("validation.pictures", problem, "use fewer, add pictures, or set validation.every to 0")
    order = torch.randperm(len(examples), generator=generator_for(seed, "validation", 0, "pictures")).tolist()
    aside = set(order[:count])
    return (
        [example for index, example in enumerate(examples) if index not in aside],
        [example for index, example in enumerate(examples) if index in aside],
    )


def validation_batches(examples: Sequence[EncodedExample], timesteps: int) -> Iterator[Batch]:
    """One batch a picture, at levels in the middle of equal shares of all; their losses sum to the mean.

    Nothing depends on the run: noise is drawn by the picture's place, and latents are their means.
    """
    levels = ((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS * timesteps).long()
    for index, example in enumerate(examples):
        latents = example.mean.expand(LEVELS, *example.mean.shape)
        noise = torch.randn(latents.shape, generator=generator_for(0, "validation", index, "noise"))
        weights = torch.full((LEVELS,), 1.0 / (LEVELS * len(examples)))
        batch = Batch([example.caption] * LEVELS, latents, noise, noise, levels, weights, None, LEVELS)
        yield batch if example.picture is None else _with_holes(batch, example.picture, index)


def _with_holes(batch: Batch, picture: Tensor, index: int) -> Batch:
    holes = drawn_holes(LEVELS, picture.shape[-2:], generator_for(0, "validation", index, "holes"))
    return replace(batch, pictures=picture.expand(LEVELS, *picture.shape), holes=holes)


class Validation:
    """Looks every so many steps and at the end; what was seen before a kill is kept beside the checkpoints.

    What a look finds depends on its step alone, so that looks which a resumed run repeats find what they found before.

    Args:
        every: Steps between looks, over all phases; 0 for none.
        phases: Of the run.
        work: Where checkpoints are.

    Raises:
        CorruptError: What is kept there cannot be read.
    """

    def __init__(self, every: int, phases: Sequence[Phase], work: Path) -> None:
        self.names = [phase.name for phase in phases for _ in range(phase.steps)]
        total = len(self.names)
        self.steps = {step for step in range(1, total + 1) if step % every == 0 or step == total} if every else set()
        self.path = work / _NAME
        self.found = {step: loss for step, loss in _read(self.path).items() if step in self.steps}
        self.look: Callable[[], float] | None = None

    def watching(self, report: Report) -> Report:
        """A report that is told `validation_loss` too, at the steps of a look."""

        def told(step: int, values: dict[str, float]) -> None:
            if step in self.steps and self.look is not None:
                self.found[step] = self.look()
                with written_whole(self.path) as file:
                    file.write(json.dumps(self.found, sort_keys=True).encode())
                values = {**values, METRIC: self.found[step]}
            report(step, values)

        return told if self.steps else report

    def losses(self) -> list[StepLoss]:
        """What all looks found, in order."""
        return [StepLoss(step, self.names[step - 1], self.found[step]) for step in sorted(self.found)]


def _read(path: Path) -> dict[int, float]:
    if not path.is_file():
        return {}
    try:
        return {int(step): float(loss) for step, loss in json.loads(path.read_text("utf-8")).items()}
    except (ValueError, TypeError, AttributeError, OSError):
        fix = f"remove the folder {path.parent} to start over"
        raise CorruptError(str(path), "cannot be read", fix) from None
