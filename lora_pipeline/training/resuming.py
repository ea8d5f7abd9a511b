"""A run's whole state, as a checkpoint holds it, and whether a run may go on from one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.errors import CorruptError
from lora_pipeline.keeping import FINISHED
from lora_pipeline.training.checkpoints import GENERATION, POINTER, Position, load_checkpoint, save_checkpoint
from lora_pipeline.training.learner import Learner, Stretch

_PARAMETER = "parameter."


@dataclass(frozen=True, eq=False)
class Past:
    """What was done before.

    Args:
        position: How far it came.
        tensors: The checkpoint's.
        losses: Of every step.
    """

    position: Position
    tensors: dict[str, Tensor]
    losses: list[float]

    @torch.no_grad()
    def give(self, stretches: Sequence[Stretch]) -> None:
        """Gives the parameters their values of then."""
        for stretch in stretches if self.tensors else ():
            for name, parameter in stretch.parameters.items():
                parameter.copy_(self.tensors[f"{_PARAMETER}{name}"])

    def restore(self, learner: Learner) -> None:
        """Gives the learner of the phase it came to its state."""
        learner.restore(self.position.rest, self.tensors)


NOTHING = Past(Position(0, 0), {}, [])


def keep(work: Path, stretches: Sequence[Stretch], learner: Learner, done: int, losses: list[float]) -> None:
    """Writes a checkpoint after `done` steps of the learner's phase.

    Raises:
        ResourceError: No space left.
        ParamsError: See `Learner.state`.
    """
    tensors = {**_learnt(stretches), "losses": torch.tensor(losses, dtype=torch.float64)}
    rest: Any = learner.state(tensors)
    number = [stretch is learner.stretch for stretch in stretches].index(True)
    position = Position(number, done, tuple(stretch.phase.steps for stretch in stretches), rest)
    save_checkpoint(work, len(losses), position, tensors)


def past(stretches: Sequence[Stretch], work: Path, say: Callable[[str], None]) -> Past:
    """What `work` holds of this run.

    A run of other step counts goes on if all that it did is what this one would have done. A finished one of the same
    step counts is asked for again, and starts anew.

    Args:
        stretches: Of this run.
        work: Where checkpoints are.
        say: Told when a run that is there is not gone on from.

    Raises:
        CorruptError: The checkpoint is damaged, or of another run.
    """
    position, tensors = load_checkpoint(work) or (None, {})
    if position is None:
        return NOTHING
    losses: list[float] = tensors["losses"].tolist() if "losses" in tensors else []
    expected = {name: tuple(tensor.shape) for name, tensor in _learnt(stretches).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(_PARAMETER)}
    done = sum(position.plan[: position.phase]) + position.step
    whole = len(position.plan) == len(stretches) and position.phase < len(stretches) and len(losses) == done
    if found != expected or not whole:
        raise CorruptError(str(work), "holds the checkpoint of another run", f"remove the folder {work} to start over")
    plan = tuple(stretch.phase.steps for stretch in stretches)
    if (plan == position.plan and (work / FINISHED).exists()) or not _same_so_far(stretches, position):
        if plan != position.plan:
            say(f"{done} steps are done, but not as a run of {_sum(plan)} does them: it starts over")
        clear(work)
        return NOTHING
    (work / FINISHED).unlink(missing_ok=True)
    return Past(position, tensors, losses)


def clear(work: Path) -> None:
    """Forgets all checkpoints; the pointer goes first, so that a kill leaves nothing half."""
    (work / POINTER).unlink(missing_ok=True)
    (work / FINISHED).unlink(missing_ok=True)
    for generation in work.glob(f"{GENERATION}*"):
        shutil.rmtree(generation, ignore_errors=True)


def _learnt(stretches: Sequence[Stretch]) -> dict[str, Tensor]:
    return {
        f"{_PARAMETER}{name}": parameter.detach()
        for stretch in stretches
        for name, parameter in stretch.parameters.items()
    }


def _same_so_far(stretches: Sequence[Stretch], position: Position) -> bool:
    """Whether the steps done are those this plan begins with: as many phases through, and at the same rates."""
    steps = [stretch.phase.steps for stretch in stretches]
    here = stretches[position.phase]
    now, then = here.phase.steps, position.plan[position.phase]
    if steps[: position.phase] != list(position.plan[: position.phase]) or position.step > now:
        return False
    return now == then or all(here.factor(step, now) == here.factor(step, then) for step in range(position.step))


def _sum(plan: Sequence[int]) -> str:
    return " and ".join(map(str, plan))
