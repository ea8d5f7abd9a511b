"""The one loop that trains the embedded base's parts: one cosine, an average of the weights, resumable.

The loss of step `n` may depend on `n` and the weights only (draw from `step_generator(seed, n)`), so a run that was
stopped and resumed computes what an undisturbed one does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT_SECONDS = 120.0
AVERAGE_DECAY = 0.999
WARM_UP_STEPS = 200

Report = Callable[[int, float], None]
Backward = Callable[[int], float]  # leaves the gradients of a step's loss in the model and returns the loss


def step_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """A generator for the draws of one step: counted, so there is no stream to save."""
    mixed = (seed * 1_000_003 + step) * 1_009 + purpose
    return torch.Generator().manual_seed(mixed % 2**63)


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train.

    `peak` is the highest learning rate; it is held for the first `hold` of the steps before it falls.
    """

    steps: int
    batch: int
    peak: float
    hold: float = 0.0
    seed: int = 0
    weight_decay: float = 0.01


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, the peak for as long as the recipe holds it, then half a cosine to a hundredth of the peak."""
    if step < WARM_UP_STEPS:
        return recipe.peak * (step + 1) / WARM_UP_STEPS
    start = max(WARM_UP_STEPS, int(recipe.hold * recipe.steps))
    done = max(0, step - start) / max(1, recipe.steps - start)
    return recipe.peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class Average:
    """An exponential moving average of the weights; early steps count less, so that the start is forgotten."""

    def __init__(self, model: nn.Module) -> None:
        self.live = dict(model.named_parameters())
        self.weights = {name: weight.detach().clone() for name, weight in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live weights after step `step`."""
        decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.weights.values()), [self.live[name] for name in self.weights], 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` carries the averaged weights."""
        live = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        load_weights(model, self.weights)
        try:
            yield
        finally:
            load_weights(model, live)


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy `weights` into the model's parameters of the same names."""
    for name, weight in model.named_parameters():
        weight.copy_(weights[name])


def save_checkpoint(
    path: Path, model: nn.Module, average: Average, optimiser: torch.optim.Optimizer, step: int
) -> None:
    """Write model, average, optimiser and `step` (the steps done) to `path`, whole or not at all."""
    tensors = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    tensors |= {f"average.{name}": weight for name, weight in average.weights.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"step": json.dumps(step)})
    partial.replace(path)


def load_checkpoint(path: Path, model: nn.Module, average: Average, optimiser: torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote; returns the steps done."""
    state: dict[int, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    averaged: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        step = int(json.loads(file.metadata()["step"]))
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            owner, _, rest = key.partition(".")
            if owner == "optimiser":
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
            else:
                (weights if owner == "model" else averaged)[rest] = file.get_tensor(key)
    load_weights(model, weights)
    average.weights = averaged
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return step


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """Fused AdamW over the weights that are trained."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)


def plain(loss_at: Callable[[int], Tensor]) -> Backward:
    """The gradients of one loss, taken in one piece."""

    def backward(step: int) -> float:
        loss = loss_at(step)
        loss.backward()
        return float(loss.detach())

    return backward


def fit(
    model: nn.Module, backward: Backward, recipe: Recipe, checkpoint: Path, report: Report,
    make_optimiser: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw,
) -> Average:  # fmt: skip
    """Minimise the loss whose gradients `backward(step)` leaves, over `recipe.steps` steps.

    Resumes from `checkpoint` where it exists.

    Returns the averaged weights; `model` itself is left with the last live ones.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = make_optimiser(model, recipe.weight_decay)
    average = Average(model)
    start = load_checkpoint(checkpoint, model, average, optimiser) if checkpoint.exists() else 0
    saved = time.monotonic()
    for step in range(start, recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = backward(step)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.update(step)
        report(step + 1, loss)
        last = step + 1 == recipe.steps
        if last or time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(checkpoint, model, average, optimiser, step + 1)
            saved = time.monotonic()
    return average
