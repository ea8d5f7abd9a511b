"""The one training loop: stretches of steps, each over its own parameters, killable between any two instructions.

The loss of a step may depend on the step and the parameters only, so that a run that was killed and started again
computes what an undisturbed one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.training.checkpoints import Position, load_checkpoint, save_checkpoint
from lora_pipeline.training.optimisation import (
    CLIP_NORM,
    learning_rate,
    make_optimiser,
    optimiser_tensors,
    restore_optimiser,
)
from lora_pipeline.training.phases import Phase

Report = Callable[[int, dict[str, float]], None]
LossAt = Callable[[int], Tensor]


@dataclass(frozen=True)
class Stretch:
    """A phase with what it moves.

    Args:
        phase: How long and how fast.
        parameters: What learns, by names that no other stretch uses.
        enter: Called when the phase starts or is resumed; gives the scalar loss of a step (from 0) of this phase.
        after_step: Called after every update.
    """

    phase: Phase
    parameters: Mapping[str, nn.Parameter]
    enter: Callable[[], LossAt]
    after_step: Callable[[], None]


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step; `step` counts from 1 over all phases."""

    step: int
    phase: str
    loss: float


def train(stretches: Sequence[Stretch], work: Path, checkpoint_every: int, report: Report) -> list[StepLoss]:
    """Runs the stretches, or what is left of them.

    Args:
        stretches: In order.
        work: Where checkpoints are kept; it must belong to exactly these stretches.
        checkpoint_every: In steps.
        report: Told the number of steps done and `loss` and `gradient_norm`, after each.

    Returns:
        All steps' losses, those before a resume included.

    Raises:
        ParamsError: The loss or its gradient stopped being finite; names the step.
        CorruptError: The checkpoint is damaged, or of another run.
        ResourceError: No space left for a checkpoint.
    """
    phases = [stretch.phase.name for stretch in stretches for _ in range(stretch.phase.steps)]
    position, losses, optimiser_state = _resumed(stretches, work)
    for number, stretch in enumerate(stretches[position.phase :], start=position.phase):
        start = position.step if number == position.phase else 0
        _let_learn(stretches, stretch)
        optimiser = make_optimiser(stretch.phase, stretch.parameters.values())
        if start:
            restore_optimiser(optimiser, stretch.parameters, optimiser_state)
        loss_at = stretch.enter() if start < stretch.phase.steps else None
        for step in range(start, stretch.phase.steps):
            assert loss_at is not None
            values = _take_step(stretch, optimiser, loss_at, step)
            losses.append(values["loss"])
            report(len(losses), values)
            done = step + 1
            if done % checkpoint_every == 0 or done == stretch.phase.steps:
                tensors = _state(stretches, losses)
                moments = optimiser_tensors(optimiser, stretch.parameters)
                tensors |= {f"optimiser.{name}": tensor for name, tensor in moments.items()}
                save_checkpoint(work, len(losses), Position(number, done), tensors)
    return [StepLoss(step, phase, loss) for step, (phase, loss) in enumerate(zip(phases, losses, strict=True), 1)]


def _let_learn(stretches: Sequence[Stretch], learning: Stretch) -> None:
    """Others gather no gradients meanwhile: a resumed run would lack those of before."""
    for stretch in stretches:
        for parameter in stretch.parameters.values():
            parameter.requires_grad_(stretch is learning)


def _take_step(stretch: Stretch, optimiser: torch.optim.Optimizer, loss_at: LossAt, step: int) -> dict[str, float]:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(stretch.phase, step)
    loss = loss_at(step)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(stretch.parameters.values(), CLIP_NORM)
    value, length = torch.stack([loss.detach(), norm.to(loss)]).tolist()  # the step's only synchronisation
    if not math.isfinite(value) or not math.isfinite(length):
        problem = f"the loss is {value} and its gradient {length} at step {step + 1} of the {stretch.phase.name}"
        raise ParamsError(f"{stretch.phase.name}.learning_rate", problem, "use a smaller one")
    optimiser.step()
    optimiser.zero_grad()
    stretch.after_step()
    return {"loss": value, "gradient_norm": length}


def _state(stretches: Sequence[Stretch], losses: list[float]) -> dict[str, Tensor]:
    tensors = {
        f"parameter.{name}": parameter.detach()
        for stretch in stretches
        for name, parameter in stretch.parameters.items()
    }
    return tensors | {"losses": torch.tensor(losses, dtype=torch.float64)}


@torch.no_grad()
def _resumed(stretches: Sequence[Stretch], work: Path) -> tuple[Position, list[float], dict[str, Tensor]]:
    checkpoint = load_checkpoint(work)
    if checkpoint is None:
        return Position(0, 0), [], {}
    position, tensors = checkpoint
    expected = _state(stretches, [])
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("parameter.")}
    losses: list[float] = tensors["losses"].tolist() if "losses" in tensors else []
    steps = [stretch.phase.steps for stretch in stretches]
    fits = position.phase < len(steps) and len(losses) == sum(steps[: position.phase]) + position.step
    if found != {name: tuple(tensor.shape) for name, tensor in expected.items() if name != "losses"} or not fits:
        raise CorruptError(str(work), "holds the checkpoint of another run", f"remove the folder {work} to start over")
    for stretch in stretches:
        for name, parameter in stretch.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    start = "optimiser."
    optimiser = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return position, losses, optimiser
