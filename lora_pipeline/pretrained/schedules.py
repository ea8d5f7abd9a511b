"""Learning rates over a phase, by diffusers' own schedules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import optimization

from lora_pipeline.errors import ParamsError

_SCHEDULES: Mapping[str, Callable[..., Any]] = {
    "constant": optimization.get_constant_schedule_with_warmup,
    "linear": optimization.get_linear_schedule_with_warmup,
    "cosine": optimization.get_cosine_schedule_with_warmup,
    "cosine_with_restarts": optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": optimization.get_polynomial_decay_schedule_with_warmup,
}
_OWN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def rate_factors(name: str, warm_up: float, options: Mapping[str, Any], steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step (from 0) of a phase.

    diffusers' functions begin at 0 and end at 0, which are steps that learn nothing. Here the first step is their
    second, and the phase ends one step before they do.

    Args:
        name: A schedule of params.yaml.
        warm_up: Below 1 a share of the phase, from 1 on a number of steps.
        options: What the schedule of diffusers takes beside them, such as `num_cycles` or `power`.
        steps: Of the phase.

    Raises:
        ParamsError: An option that the schedule does not have or does not take.
    """
    make = _SCHEDULES[name]
    known = [each for each in inspect.signature(make).parameters if each not in _OWN]
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "write {}"
            raise ParamsError("optimiser.schedule_options", f"{name} has no {option!r}", has)
    warm = max(1, round(warm_up * steps if warm_up < 1 else warm_up))
    total = {} if name == "constant" else {"num_training_steps": steps + 1}
    idle = torch.optim.SGD([torch.zeros(())], lr=1.0)
    try:
        factor: Callable[[int], float] = make(idle, num_warmup_steps=warm, **total, **options).lr_lambdas[0]
        return lambda step: float(factor(step + 1))
    except (TypeError, ValueError) as error:
        raise ParamsError("optimiser.schedule_options", f"{name} refuses them: {error}", "correct them") from error
