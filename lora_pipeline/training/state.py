"""Nested state, such as an optimiser's, as tensors by name and JSON for the rest, without loss.

{"step": 3, "moments": [tensor, tensor]}
-> {"mapping": [["step", 3], ["moments", {"list": [{"tensor": "x.moments.0", ...}, ...]}]]} and the two tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_pipeline.adapters.storage import DTYPE_NAMES
from lora_pipeline.errors import ParamsError


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors are put into `tensors`, under names that start with `name`.

    Raises:
        TypeError: Something in it is neither a tensor nor a plain value or a list, tuple or dict of them.
    """
    if isinstance(value, Tensor) and value.dtype in DTYPE_NAMES:
        tensors[name] = value.detach()
        return {"tensor": name, "device": value.device.type}
    if isinstance(value, dict):
        return {"mapping": [[key, packed(each, f"{name}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        items = [packed(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}")


def unpacked(document: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The opposite of `packed`; tensors that were not on the CPU come to `device`."""
    if not isinstance(document, dict):
        return document
    if "tensor" in document:
        tensor = tensors[document["tensor"]]
        return tensor.clone() if document["device"] == "cpu" else tensor.to(device)
    if "mapping" in document:
        return {key: unpacked(each, tensors, device) for key, each in document["mapping"]}
    kind = "list" if "list" in document else "tuple"
    items = [unpacked(each, tensors, device) for each in document[kind]]
    return items if kind == "list" else tuple(items)


def optimiser_state(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: dict[str, Tensor]
) -> Any:
    """An optimiser's state by parameter name, and what its groups hold beside parameters; see `packed`.

    Raises:
        ParamsError: It holds what cannot be stored.
    """
    state = {name: dict(optimiser.state.get(parameter, {})) for name, parameter in parameters.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimiser.param_groups]
    try:
        return packed({"state": state, "groups": groups}, "optimiser", tensors)
    except TypeError as error:
        problem = f"{type(optimiser).__name__} keeps what a checkpoint cannot hold: {error}"
        raise ParamsError("optimiser.name", problem, "use another, such as adamw") from None


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """A moment in the memory order of its parameter: fused kernels read both as they lie."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def restore_optimiser(
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    document: Any,
    tensors: Mapping[str, Tensor],
) -> None:
    """The opposite of `optimiser_state`, bit for bit: torch's own `load_state_dict` would change dtypes."""
    for name, parameter in parameters.items():
        held = dict(document["mapping"])["state"]
        state = unpacked(dict(held["mapping"])[name], tensors, parameter.device)
        if state:
            optimiser.state[parameter] = {key: _laid_out(value, parameter) for key, value in state.items()}
    device = next(iter(parameters.values())).device
    groups = unpacked(dict(document["mapping"])["groups"], tensors, device)
    for group, values in zip(optimiser.param_groups, groups, strict=True):
        group.update(values)
