"""The weights of a run, ready for the sampler: which row acts in which step, and how it is made to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import nn

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.targets import UNET
from lora_pipeline.injection.inject import injected_layers, set_weights
from lora_pipeline.pretrained.components import Components
from lora_pipeline.rendering.executors import Executor, fusing, gating
from lora_pipeline.rendering.schedule import WeightSchedule
from lora_pipeline.rendering.table import WeightTable, table_of

ROOM = 2 * 2**30  # bytes of fused weights that are kept
FEW_CELLS = 1024  # of a picture's latents: up to 256 x 256 pixels fusing in every step costs more than gates
EXECUTORS = ("auto", "fuse", "cache", "gate")


@dataclass(frozen=True, eq=False)
class Weighting:
    """What the sampler asks before it calls a model.

    Args:
        steps: By step the rows of the UNet and of the text encoders; of several, whose predictions are averaged.
        use: Has a row act in the UNet.
        use_text: Has a row act in the text encoders.
    """

    steps: Sequence[Sequence[tuple[int, int]]]
    use: Callable[[int], None]
    use_text: Callable[[int], None]


def unweighted(steps: int) -> Weighting:
    """Everything acts as it is."""
    return Weighting([[(0, 0)]] * steps, _nothing, _nothing)


def _nothing(_: int) -> None:
    """There is one row."""


@contextmanager
def weighted(
    components: Components,
    adapters: Mapping[str, Adapter],
    schedules: Mapping[str, WeightSchedule],
    steps: int,
    *,
    combine: str = "sum",
    every: int = 1,
    executor: str = "auto",
) -> Iterator[Weighting]:
    """Inside, what `Weighting` says acts; afterwards the base is as it was, bit for bit.

    Args:
        components: The base, with the adapters attached.
        adapters: By name.
        schedules: The same.
        steps: Of the sampler.
        combine: See `table_of`.
        every: The same.
        executor: One of `EXECUTORS`: `fuse` makes weights anew when they change, `cache` keeps what it made, `gate`
            leaves the weights alone; `auto` see `chosen`.

    Raises:
        ParamsError: See `table_of`.
    """
    factors = {name: adapter.factors for name, adapter in adapters.items()}
    whole = table_of(schedules, factors, steps, combine, every)
    table = whole.of_model(UNET)
    text_steps, use_text = _text(components, whole)
    steps_of_both = [list(zip(*rows, strict=True)) for rows in zip(table.steps, text_steps, strict=True)]
    with _acting(components, table, chosen(components, table) if executor == "auto" else executor) as acting:
        yield Weighting(steps_of_both, acting.use, use_text)


def chosen(components: Components, table: WeightTable) -> str:
    """The executor that costs least: by what changes how often, not by the clock, as rounding differs between them.

    Kept weights cost a pass over the set and then nothing. Where they do not fit, a change costs about what gates cost
    in two steps of a 256 x 256 picture, and less the larger it is.
    """
    touched = [layer.base.weight for layer in injected_layers(components.unet) if layer.target in table.targets]
    size = sum(weight.numel() * weight.element_size() for weight in touched)
    if len(table.rows) * size <= ROOM:
        return "cache"
    side = components.unet.config.sample_size
    cells = side * side if isinstance(side, int) else side[0] * side[1]
    often = 2 * table.changes() > len(table.steps)
    return "gate" if often and cells <= FEW_CELLS else "fuse"


@contextmanager
def _acting(components: Components, table: WeightTable, executor: str) -> Iterator[Executor]:
    if executor == "gate":
        with gating(components.unet, table) as gated:
            yield gated
    else:
        with fusing(components.unet, table, ROOM if executor == "cache" else 0) as fused:
            yield fused


def _text(components: Components, whole: WeightTable) -> tuple[list[list[int]], Callable[[int], None]]:
    """Rows of all text encoders together: prompts are encoded anew for every distinct one."""
    parts = [(encoder, whole.of_model(prefix)) for prefix, (_, encoder) in components.readers.items()]
    known: dict[tuple[int, ...], int] = {}
    steps = [
        [known.setdefault(rows, len(known)) for rows in zip(*step, strict=True)]
        for step in zip(*(part.steps for _, part in parts), strict=True)
    ]
    distinct = list(known)

    def use(row: int) -> None:
        for (encoder, part), own in zip(parts, distinct[row], strict=True):
            _set(encoder, part, part.rows[own])

    return steps, use


def _set(encoder: nn.Module, part: WeightTable, row: np.ndarray) -> None:
    places = {name: number for number, name in enumerate(part.adapters)}
    columns = {target: column for column, target in enumerate(part.targets)}
    set_weights(encoder, lambda target, name: float(row[places[name], columns[target]]))
