"""Three ways to have a row of weights act: fused into the layers' weights, the same kept, or gates beside the layers.

All give the same pictures, and leave the model as it was. Fused weights are always made from the base's own,
W = round(float32(W0) + Σ weight · change), so that nothing drifts however often they change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lora_pipeline.adapters.dora import dora_change
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.injection.branches import LoraBranch
from lora_pipeline.injection.layers import InjectedLayer
from lora_pipeline.rendering.table import WeightTable

_GATES = "gates"


class Executor(Protocol):
    """Has rows of a table act on a model."""

    def use(self, row: int) -> None:
        """From now on the model computes with this row's weights."""
        ...


@dataclass(eq=False)
class Stack:
    """What all adapters do to one layer, side by side.

    Args:
        layer: With their branches.
        path: Of the layer in its model.
        column: Of the table.
        down, up: (ranks, in[, h, w]) and (out, ranks[, 1, 1]), scales multiplied in; None where no adapter has any.
        owners: (ranks,): whose rank it is, by the adapter's number.
        doras: Numbers and branches of those whose change depends on the weight.
    """

    layer: InjectedLayer
    path: str
    column: int
    down: Tensor | None
    up: Tensor | None
    owners: np.ndarray
    doras: Sequence[tuple[int, LoraBranch]]

    def gates(self, weights: np.ndarray) -> Tensor:
        """(ranks,) the weight of each rank, of (adapters,)."""
        weight = self.layer.base.weight
        return torch.from_numpy(weights[self.owners]).to(weight.device, torch.float32)


def stacks_of(model: nn.Module, table: WeightTable) -> list[Stack]:
    """The injected layers of a model that a table has weights for."""
    numbers = {name: number for number, name in enumerate(table.adapters)}
    columns = {target: column for column, target in enumerate(table.targets)}
    found = []
    for path, layer in model.named_modules():
        if not isinstance(layer, InjectedLayer) or layer.target not in columns:
            continue
        plain = [(numbers[name], each.factors()) for name, each in layer.branches.items() if each.magnitude is None]
        doras = [(numbers[name], each) for name, each in layer.branches.items() if each.magnitude is not None]
        down = torch.cat([each.down for _, each in plain]) if plain else None
        up = torch.cat([each.up * each.scale for _, each in plain], dim=1) if plain else None
        owners = np.repeat([number for number, _ in plain], [each.rank for _, each in plain]).astype(int)
        found.append(Stack(layer, path, columns[layer.target], down, up, owners, doras))
    return found


class Fused:
    """Weights of the layers themselves; what was made is kept while there is room.

    Args:
        stacks: Of the layers.
        table: Of the model.
        room: Bytes of weights that may be kept; 0 keeps those in use alone.
    """

    def __init__(self, stacks: Sequence[Stack], table: WeightTable, room: int) -> None:
        self.stacks = stacks
        self.table = table
        self.left = room
        self.originals = [stack.layer.base.weight.data for stack in stacks]
        self.now: list[bytes] = [b""] * len(stacks)
        self.kept: dict[tuple[int, bytes], Tensor] = {}

    def use(self, row: int) -> None:
        """See `Executor`; layers whose weights do not change are not touched."""
        weights = self.table.rows[row]
        for index, stack in enumerate(self.stacks):
            own = np.ascontiguousarray(weights[:, stack.column])
            key = own.tobytes()
            if key != self.now[index]:
                stack.layer.base.weight.data = self._weight(index, stack, own, key)
                self.now[index] = key

    def _weight(self, index: int, stack: Stack, weights: np.ndarray, key: bytes) -> Tensor:
        original = self.originals[index]
        if not weights.any():
            return original
        if (index, key) in self.kept:
            return self.kept[index, key]
        made = fused_weight(stack, original, weights)
        size = made.numel() * made.element_size()
        if size <= self.left:
            self.left -= size
            self.kept[index, key] = made
        return made

    def restore(self) -> None:
        """Gives the layers their own weights back."""
        for stack, original in zip(self.stacks, self.originals, strict=True):
            stack.layer.base.weight.data = original


@torch.no_grad()
def fused_weight(stack: Stack, original: Tensor, weights: np.ndarray) -> Tensor:
    """W0 + Σ weight · change, summed in float32 and rounded once; laid out as W0 is."""
    total = original.float().flatten(1)
    if stack.down is not None and stack.up is not None:
        total = torch.addmm(total, stack.up.flatten(1) * stack.gates(weights), stack.down.flatten(1))
    for number, branch in stack.doras:
        if weights[number] and branch.magnitude is not None:
            change = dora_change(stack.layer.target, original, branch.factors(), branch.magnitude)
            total = total + float(weights[number]) * change.flatten(1).float()
    return torch.empty_like(original).copy_(total.reshape(original.shape))


class Gated:
    """One branch beside each layer, of all adapters' ranks, whose weights are multiplied into `down`.

    Args:
        stacks: Of the layers; DoRAs keep branches of their own.
        table: Of the model.
    """

    def __init__(self, stacks: Sequence[Stack], table: WeightTable) -> None:
        self.stacks = stacks
        self.table = table
        self.branches: list[LoraBranch | None] = []
        for stack in stacks:
            if stack.down is None or stack.up is None:
                self.branches.append(None)
                continue
            factors = LoraFactors(stack.down, stack.up, float(len(stack.down)))
            self.branches.append(LoraBranch(factors, trainable=False).to(stack.down.device))
        self.now: list[bytes] = [b""] * len(stacks)

    @torch.no_grad()
    def use(self, row: int) -> None:
        """See `Executor`."""
        weights = self.table.rows[row]
        for index, (stack, branch) in enumerate(zip(self.stacks, self.branches, strict=True)):
            own = np.ascontiguousarray(weights[:, stack.column])
            if own.tobytes() == self.now[index]:
                continue
            self.now[index] = own.tobytes()
            for number, dora in stack.doras:
                dora.weight = float(own[number])
            if branch is not None and stack.down is not None:
                gates = stack.gates(own)
                branch.weight = float(bool(gates.any()))
                branch.down.copy_(stack.down * gates.reshape(-1, *[1] * (stack.down.ndim - 1)))


@contextmanager
def fusing(model: nn.Module, table: WeightTable, room: int) -> Iterator[Fused]:
    """Inside, the model's own layers stand where the injected ones were, with weights that `use` changes."""
    stacks = stacks_of(model, table)
    executor = Fused(stacks, table, room)
    for stack in stacks:
        model.set_submodule(stack.path, stack.layer.base)
    try:
        yield executor
    finally:
        executor.restore()
        for stack in stacks:
            model.set_submodule(stack.path, stack.layer)


@contextmanager
def gating(model: nn.Module, table: WeightTable) -> Iterator[Gated]:
    """Inside, each injected layer has one branch for all adapters, with weights that `use` changes."""
    stacks = stacks_of(model, table)
    executor = Gated(stacks, table)
    before = [(stack.layer.branches, stack.layer.stack) for stack in stacks]
    for stack, branch in zip(stacks, executor.branches, strict=True):
        own = {name: each for name, each in stack.layer.branches.items() if each.magnitude is not None}
        stack.layer.branches, stack.layer.stack = {}, nn.ModuleList()
        for name, each in {**own, **({_GATES: branch} if branch is not None else {})}.items():
            stack.layer.add_branch(name, each)
    try:
        yield executor
    finally:
        for stack, (branches, modules) in zip(stacks, before, strict=True):
            stack.layer.branches, stack.layer.stack = branches, modules
