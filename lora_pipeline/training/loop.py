"""The one training loop: stretches of steps, each over its own parameters, killable between any two instructions.

The loss of a batch may depend on its number and the parameters only, so that a run that was killed and started again
computes what an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_pipeline.training.learner import Learner, LossAt, Stretch
from lora_pipeline.training.processes import ALONE, Crew
from lora_pipeline.training.resuming import keep, past
from lora_pipeline.training.watch import check_divergence, not_finite

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams

__all__ = ["LossAt", "Report", "StepLoss", "Stretch", "train"]

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step; `step` counts from 1 over all phases."""

    step: int
    phase: str
    loss: float


def train(
    stretches: Sequence[Stretch], work: Path, params: TrainParams, report: Report,
    crew: Crew = ALONE, say: Callable[[str], None] = lambda _: None,
) -> list[StepLoss]:  # fmt: skip
    """Runs the stretches, or what is left of them.

    Args:
        stretches: In order.
        work: Where checkpoints are kept; it must belong to exactly these stretches, but for their numbers of steps.
        params: How; `checkpoint_every`, `optimiser` and `engine` count here.
        report: Told the number of steps done and `loss` and `gradient_norm`, after each.
        crew: The processes that train together; the first alone uses `work`.
        say: Told what a user should know.

    Returns:
        All steps' losses, those before a resume included.

    Raises:
        ParamsError: A value cannot be, the loss or its gradient stopped being finite, or the loss diverges.
        MissingError: The optimiser's package is not installed.
        CorruptError: The checkpoint is damaged, or of another run.
        ResourceError: No space left for a checkpoint.
    """
    before = crew.told(lambda: past(stretches, work, say))
    before.give(stretches)
    losses = list(before.losses)
    for number, stretch in enumerate(stretches):
        if number < before.position.phase:
            continue
        start = before.position.step if number == before.position.phase else 0
        _let_learn(stretches, stretch)
        learner = Learner(stretch, params, crew)
        if start:
            before.restore(learner)
        _run(stretches, learner, range(start, stretch.phase.steps), losses, work, params.checkpoint_every, report)
        learner.finish()
    phases = [stretch.phase.name for stretch in stretches for _ in range(stretch.phase.steps)]
    return [StepLoss(step, phase, loss) for step, (phase, loss) in enumerate(zip(phases, losses, strict=True), 1)]


def _run(
    stretches: Sequence[Stretch], learner: Learner, steps: range, losses: list[float], work: Path,
    checkpoint_every: int, report: Report,
) -> None:  # fmt: skip
    """The steps of one phase that are left; their losses join `losses`."""
    if not steps:
        return
    phase, opening = learner.stretch.phase, len(losses) - steps.start
    loss_at = learner.stretch.enter()
    for step in steps:
        values = learner.take_step(loss_at, step)
        losses.append(values["loss"])
        report(len(losses), values)
        check_divergence(phase.name, losses, opening)
        done = step + 1
        if done % checkpoint_every == 0 or done == phase.steps:
            _check_finite(learner, done)
            if learner.crew.first:
                keep(work, stretches, learner, done, losses)


def _let_learn(stretches: Sequence[Stretch], learning: Stretch) -> None:
    """Others gather no gradients meanwhile: a resumed run would lack those of before."""
    for stretch in stretches:
        for name, parameter in stretch.parameters.items():
            parameter.requires_grad_(name in learning.parameters)


def _check_finite(learner: Learner, done: int) -> None:
    for name, parameter in learner.stretch.parameters.items():
        if not bool(parameter.isfinite().all()):
            raise not_finite(learner.stretch.phase.name, done, "what was learnt is not finite", name, half=False)
