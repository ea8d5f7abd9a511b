"""Optimisers: by name or import path, over groups of parameters; and a guard on token rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_pipeline.errors import MissingError, ParamsError

if TYPE_CHECKING:
    from lora_pipeline.params.training import OptimiserParams

OPTIMISERS = {
    "adamw": "torch.optim.AdamW",  # Loshchilov & Hutter 2017, arXiv:1711.05101
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",  # Dettmers et al. 2021, arXiv:2110.02861
    "adafactor": "torch.optim.Adafactor",  # Shazeer & Stern 2018, arXiv:1804.04235
    "prodigy": "lora_pipeline.training.prodigy.Prodigy",
    "lion": "lora_pipeline.training.lion.Lion",
}
_OWN_OPTIONS = {"adamw": {"fused": True}}
_ELSEWHERE = {"lr": "inversion.learning_rate and tuning.learning_rate", "weight_decay": "optimiser.weight_decay"}


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that learn alike.

    Args:
        parameters: What learns.
        rate: Times the phase's learning rate, above 0.
        decayed: Whether weight decay pulls them towards 0.
    """

    parameters: Sequence[nn.Parameter]
    rate: float
    decayed: bool


def groups_of(
    parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float], undecayed: frozenset[str]
) -> list[Group]:
    """The parameters by rate and decay, in the order in which each kind comes first."""
    gathered: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        gathered.setdefault((rates.get(name, 1.0), name not in undecayed), []).append(parameter)
    return [Group(members, rate, decayed) for (rate, decayed), members in gathered.items()]


def make_optimiser(params: OptimiserParams, groups: Sequence[Group], learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser that params.yaml asks for.

    Args:
        params: The section `optimiser`.
        groups: What it moves, one of its own groups each.
        learning_rate: The phase's.

    Raises:
        ParamsError: No such optimiser, or an option that it does not have or does not take.
        MissingError: Its package is not installed.
    """
    kind = optimiser_class(params.name)
    options = _options(params, kind)
    decay = params.weight_decay
    given = [
        {"params": list(group.parameters), "lr": learning_rate * group.rate}
        | ({"weight_decay": decay if group.decayed else 0.0} if "weight_decay" in _known(kind) else {})
        for group in groups
    ]
    try:
        return kind(given, lr=learning_rate, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ParamsError("optimiser.options", f"{params.name} refuses them: {error}", "correct them") from error


def optimiser_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of a name of `OPTIMISERS`, or of an import path `package.module.Class`.

    Raises:
        ParamsError: It is neither, or no optimiser that this loop can use.
        MissingError: Its package is not installed.
    """
    path = OPTIMISERS.get(name, name)
    module, _, attribute = path.rpartition(".")
    if not module:
        fix = f"use one of {', '.join(OPTIMISERS)}, or a class, as package.module.Class"
        raise ParamsError("optimiser.name", f"there is no {name!r}", fix)
    try:
        kind = getattr(import_module(module), attribute, None)
    except ImportError as error:
        package = path.split(".", maxsplit=1)[0]
        problem = f"{name} needs {package}, which cannot be imported ({error})"
        raise MissingError("optimiser.name", problem, f"pip install {package}, or use adamw") from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ParamsError("optimiser.name", f"{path} is no class of torch.optim.Optimizer", "name one that is")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ParamsError("optimiser.name", f"{path} needs to compute the loss several times a step", "use adamw")
    if hasattr(kind, "eval"):
        raise ParamsError("optimiser.name", f"{path} keeps what it learns apart from the weights", "use adamw")
    return kind


def _known(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def _options(params: OptimiserParams, kind: type) -> dict[str, Any]:
    """What the class is given beside rates; an option of null is left to the class."""
    known = _known(kind)
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
    given = {name: value for name, value in params.options.items() if value is not None}
    for name in given:
        if name in _ELSEWHERE:
            raise ParamsError("optimiser.options", f"{name!r} has a key of its own", f"set {_ELSEWHERE[name]}")
        if name == "params" or (name not in known and not open_ended):
            has = ", ".join(each for each in list(known)[1:] if each not in _ELSEWHERE)
            fix = f"it has {has}; null takes an inherited option away"
            raise ParamsError("optimiser.options", f"{params.name} has no {name!r}", fix)
    if params.weight_decay and "weight_decay" not in known:
        raise ParamsError("optimiser.weight_decay", f"{params.name} has none", "write 0")
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return {**_OWN_OPTIONS.get(params.name, {}), **own}


@torch.no_grad()
def guard_norms(rows: Tensor, largest: float) -> None:
    """Shortens, in place, rows longer than any word the text encoder knows; beyond them it was never trained.

    Args:
        rows: (vectors, dim).
        largest: The largest norm among the base's own rows.
    """
    rows.mul_((largest / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0))
