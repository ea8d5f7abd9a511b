"""All weights of a run in one table: which adapter acts how strongly, in which step, in which layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_pipeline.adapters.blocks import block_factors
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import UNET, root
from lora_pipeline.errors import ParamsError
from lora_pipeline.rendering.schedule import WeightSchedule, progresses

Factors = Mapping[str, Mapping[str, LoraFactors]]


@dataclass(frozen=True, eq=False)
class WeightTable:
    """The distinct rows of a run, and which steps use them.

    Args:
        adapters: Their names.
        targets: The layers, sorted.
        rows: (rows, adapters, targets) float64; 0 where an adapter does not change a layer.
        steps: By step the row in use; or several, of whose predictions the mean is taken.
    """

    adapters: tuple[str, ...]
    targets: tuple[str, ...]
    rows: np.ndarray
    steps: tuple[tuple[int, ...], ...]

    def of_model(self, prefix: str) -> WeightTable:
        """What concerns one model, with its own distinct rows."""
        mine = [index for index, target in enumerate(self.targets) if target.startswith(root(prefix))]
        targets = tuple(self.targets[index] for index in mine)
        dense = [[self.rows[row][:, mine] for row in step] for step in self.steps]
        return _deduped(self.adapters, targets, dense)

    def changes(self) -> int:
        """How often a step needs another row than the one before; the first counts."""
        used = [row for step in self.steps for row in step]
        return sum(before != after for before, after in zip([-1, *used], used, strict=False))


def table_of(
    schedules: Mapping[str, WeightSchedule], factors: Factors, steps: int, combine: str = "sum", every: int = 1
) -> WeightTable:
    """The table of a run.

    Args:
        schedules: By adapter.
        factors: What each adapter changes, by target.
        steps: Of the sampler.
        combine: One of `COMBINE`.
        every: How many steps an adapter's turn has, of `switch`.

    Raises:
        ParamsError: A block or layer that an adapter does not have, or adapters that `combine` cannot be for.
    """
    adapters = tuple(schedules)
    targets = tuple(sorted({target for each in factors.values() for target in each}))
    blocks = np.zeros((len(adapters), len(targets)))
    places = {target: index for index, target in enumerate(targets)}
    for number, (name, each) in enumerate(schedules.items()):
        for target, factor in block_factors(f"weights.{name}.blocks", each.blocks, factors[name]).items():
            blocks[number, places[target]] = factor
    over_time = np.array([[each.at(progress) for each in schedules.values()] for progress in progresses(steps)])
    plain = over_time[:, :, None] * blocks
    dense = COMBINE[combine](plain, every, Choice(adapters, targets, factors))
    return _deduped(adapters, targets, dense)


@dataclass(frozen=True, eq=False)
class Choice:
    """What a way to combine may choose by."""

    adapters: tuple[str, ...]
    targets: tuple[str, ...]
    factors: Factors


Dense = list[list[np.ndarray]]  # by step the rows whose predictions are averaged, each (adapters, targets)


def _sum(plain: np.ndarray, every: int, choice: Choice) -> Dense:
    del every, choice
    return [[row] for row in plain]


def _switch(plain: np.ndarray, every: int, choice: Choice) -> Dense:
    """LoRA Switch (Zhong et al. 2024, arXiv:2402.16843, section 3.1): one adapter at a time, in turns."""
    count = len(choice.adapters)
    return [[row * _only(step // every % count, count)] for step, row in enumerate(plain)]


def _composite(plain: np.ndarray, every: int, choice: Choice) -> Dense:
    """LoRA Composite (the same, section 3.2): the mean of what each adapter alone predicts."""
    del every
    count = len(choice.adapters)
    return [[row * _only(number, count) for number in range(count)] for row in plain]


def _only(number: int, count: int) -> np.ndarray:
    only: np.ndarray = np.eye(count)[number][:, None]
    return only


def _k_lora(plain: np.ndarray, every: int, choice: Choice) -> Dense:
    """K-LoRA (Ouyang et al. 2025, arXiv:2502.18461, section 3): in each layer of the UNet the stronger of two.

    Strength is the sum of a change's r_1 · r_2 largest values. The style's is multiplied by `1.5 t + 0.5` with the
    progress t, and by how much larger the subject's changes are altogether, so that it comes in as details form.
    """
    del every
    if len(choice.adapters) != 2:
        problem = (
            f"is k_lora, which chooses between a subject and a style, and there are {len(choice.adapters)} adapters"
        )
        raise ParamsError("combine", problem, "give the weights of two: the subject first, then the style")
    subject, style = (choice.factors[name] for name in choice.adapters)
    shared = [target for target in choice.targets if target in subject and target in style]
    both = [target for target in shared if target.startswith(root(UNET))]
    strengths = {target: _strengths(subject[target], style[target]) for target in both}
    totals = np.array([each[2:] for each in strengths.values()]).sum(axis=0) if both else np.ones(2)
    balance = totals[0] / max(totals[1], 1e-30)
    dense: Dense = []
    for progress, row in zip(progresses(len(plain)), plain, strict=True):
        chosen = row.copy()
        for index, target in enumerate(choice.targets):
            if target in strengths:
                of_subject, of_style = strengths[target][:2]
                loses = 1 if of_subject >= of_style * (1.5 * progress + 0.5) * balance else 0
                chosen[loses, index] = 0.0
        dense.append([chosen])
    return dense


def _strengths(one: LoraFactors, other: LoraFactors) -> tuple[float, float, float, float]:
    """Of both changes the sum of their largest values, and of all."""
    count = one.rank * other.rank
    sizes = [each.delta().abs().flatten() for each in (one, other)]
    largest = [float(each.topk(min(count, each.numel())).values.double().sum()) for each in sizes]
    return largest[0], largest[1], float(sizes[0].double().sum()), float(sizes[1].double().sum())


COMBINE: Mapping[str, Callable[[np.ndarray, int, Choice], Dense]] = {
    "sum": _sum, "switch": _switch, "composite": _composite, "k_lora": _k_lora,
}  # fmt: skip


def _deduped(adapters: tuple[str, ...], targets: tuple[str, ...], dense: Sequence[Sequence[np.ndarray]]) -> WeightTable:
    """Equal rows once."""
    known: dict[bytes, int] = {}
    rows: list[np.ndarray] = []
    steps = []
    for step in dense:
        used = []
        for row in step:
            row = row + 0.0  # -0 is 0
            key = row.tobytes()
            if key not in known:
                known[key] = len(rows)
                rows.append(row)
            used.append(known[key])
        steps.append(tuple(used))
    stacked = np.stack(rows) if rows else np.zeros((0, len(adapters), len(targets)))
    return WeightTable(adapters, targets, stacked, tuple(steps))
