"""One phase's learning: how gradients become a step, and what a checkpoint must keep of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_pipeline.training.averaging import Average
from lora_pipeline.training.optimisation import groups_of, make_optimiser
from lora_pipeline.training.phases import Phase
from lora_pipeline.training.processes import Crew
from lora_pipeline.training.scaling import LossScale
from lora_pipeline.training.state import optimiser_state, restore_optimiser
from lora_pipeline.training.watch import first_not_finite, not_finite

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams

LossAt = Callable[[int], Tensor]
_AVERAGE = "average."


def _flat(step: int, steps: int) -> float:
    del step, steps
    return 1.0


@dataclass(frozen=True)
class Stretch:
    """A phase with what it moves.

    Args:
        phase: How long and how fast.
        parameters: What learns; a name that two stretches use is of one parameter.
        enter: Called when the phase starts or is resumed; gives the scalar loss of a batch (from 0) of this phase.
        after_step: Called after every update.
        factor: Of the learning rate at a step (from 0) of a phase of so many steps.
        rates: Factors of the learning rate by parameter, above 0; 1 where it says nothing.
        undecayed: Parameters that weight decay leaves alone.
        turn: Which of the parameters learn in a step; None for all of them in every step.
    """

    phase: Phase
    parameters: Mapping[str, nn.Parameter]
    enter: Callable[[], LossAt]
    after_step: Callable[[], None]
    factor: Callable[[int, int], float] = _flat
    rates: Mapping[str, float] = field(default_factory=dict)
    undecayed: frozenset[str] = frozenset()
    turn: Callable[[int], Collection[str]] | None = None


class Learner:
    """Takes the steps of a stretch.

    Args:
        stretch: What learns.
        params: How; its `optimiser` and `engine` count here.
        crew: The processes that share each step's batches.

    Raises:
        ParamsError, MissingError: See `make_optimiser` and `Crew.share`.
    """

    def __init__(self, stretch: Stretch, params: TrainParams, crew: Crew) -> None:
        self.stretch = stretch
        self.crew = crew
        self.batches = params.optimiser.accumulation
        self.share = crew.share(self.batches)
        self.clip_norm = params.optimiser.clip_norm
        groups = groups_of(stretch.parameters, stretch.rates, stretch.undecayed)
        self.rates = [group.rate for group in groups]
        self.optimiser = make_optimiser(params.optimiser, groups, stretch.phase.learning_rate)
        decay = params.optimiser.ema
        self.average = None if decay is None else Average(stretch.parameters, decay)
        self.scale = LossScale() if params.engine.precision == "float16" else None

    def take_step(self, loss_at: LossAt, step: int) -> dict[str, float]:
        """Moves the parameters.

        Args:
            loss_at: The loss of a batch; step n has those from n · accumulation on, and minimises their mean.
            step: From 0.

        Returns:
            `loss`, and `gradient_norm` before clipping; a float16 step whose gradient overflowed has no norm and moves
            nothing.

        Raises:
            ParamsError: The loss or its gradient is not finite; names the step and the layer.
        """
        phase = self.stretch.phase
        rate = phase.learning_rate * self.stretch.factor(step, phase.steps)
        for group, own in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * own
        if self.stretch.turn is not None:
            self._take_turns(self.stretch.turn(step))
        loss = self._gradients(loss_at, step)
        norm = self._norm()
        value, length = torch.stack([loss, norm.to(loss)]).tolist()  # the step's only synchronisation
        if not math.isfinite(value) or not math.isfinite(length):
            if self._overflowed(value):
                return {"loss": value}
            raise self._failure(loss_at, step, value, length)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.scale is not None:
            self.scale.worked()
        self.stretch.after_step()
        if self.average is not None:
            self.average.follow(step + 1)
        return {"loss": value, "gradient_norm": length}

    def _take_turns(self, learning: Collection[str]) -> None:
        """Only these gather gradients; an optimiser moves nothing that has none."""
        for name, parameter in self.stretch.parameters.items():
            parameter.requires_grad_(name in learning)

    def _gradients(self, loss_at: LossAt, step: int) -> Tensor:
        """The mean loss of the step's batches, whose gradient the parameters then have."""
        losses = []
        for place in self.share:
            loss = loss_at(step * self.batches + place)
            mine = loss if self.batches == 1 else loss / self.batches
            (mine if self.scale is None else mine * self.scale.value).backward()
            losses.append(mine.detach())
        self.crew.sum_gradients(self.stretch.parameters.values())
        return self.crew.summed(losses[0] if len(losses) == 1 else torch.stack(losses).sum())

    def _norm(self) -> Tensor:
        parameters = list(self.stretch.parameters.values())
        gradients = [each.grad for each in parameters if each.grad is not None]
        if self.scale is not None:
            torch._foreach_mul_(gradients, 1.0 / self.scale.value)
        if self.clip_norm is None:
            return nn.utils.get_total_norm(gradients)
        return nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    def _overflowed(self, value: float) -> bool:
        """Whether a smaller scale may help; then the step is left out."""
        if self.scale is None or not math.isfinite(value) or self.scale.value <= 1.0:
            return False
        self.scale.overflowed()
        self.optimiser.zero_grad()
        return True

    def _failure(self, loss_at: LossAt, step: int, value: float, length: float) -> Exception:
        self.optimiser.zero_grad()
        layer = first_not_finite(self.stretch.parameters, lambda: self._gradients(loss_at, step))
        self.optimiser.zero_grad()
        found = f"the loss is {value} and its gradient {length}"
        return not_finite(self.stretch.phase.name, step + 1, found, layer, half=self.scale is not None)

    def state(self, tensors: dict[str, Tensor]) -> Any:
        """JSON of all that the next steps depend on beside the parameters; its tensors are put into `tensors`."""
        if self.average is not None:
            tensors |= {f"{_AVERAGE}{name}": tensor for name, tensor in self.average.tensors.items()}
        held = optimiser_state(self.optimiser, self.stretch.parameters, tensors)
        return {"optimiser": held, "scale": None if self.scale is None else asdict(self.scale)}

    def restore(self, document: Any, tensors: Mapping[str, Tensor]) -> None:
        """The opposite of `state`."""
        restore_optimiser(self.optimiser, self.stretch.parameters, document["optimiser"], tensors)
        if self.scale is not None:
            self.scale = LossScale(**document["scale"])
        if self.average is not None:
            self.average.restore({name: tensors[f"{_AVERAGE}{name}"] for name in self.stretch.parameters})

    def finish(self) -> None:
        """After the phase's last step and its checkpoint: what is kept of it takes the parameters' place."""
        if self.average is not None:
            self.average.take_over()
