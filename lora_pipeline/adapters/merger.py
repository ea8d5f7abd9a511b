"""What becomes of each parameter of a base: untouched, changed by adapters, or lengthened by tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import check_family
from lora_pipeline.adapters.checkpoints.slots import Place, Slot
from lora_pipeline.adapters.composition import Part, summed
from lora_pipeline.adapters.dora import dora_change
from lora_pipeline.adapters.lora import fitted
from lora_pipeline.adapters.storage import DTYPE_NAMES, DTYPES, Span
from lora_pipeline.adapters.targets import is_target, root
from lora_pipeline.adapters.weights import Weights
from lora_pipeline.errors import CorruptError

DTYPES_BY_NAME = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FIX = "use the base this adapter was trained on"


@dataclass(frozen=True, eq=False)
class TokenRows:
    """New rows of a token table.

    Args:
        rows: (vectors, dim) float32.
        first: The id of the first of them.
    """

    rows: Tensor
    first: int

    @classmethod
    def of(cls, embeddings: Mapping[str, Tensor], first: int) -> TokenRows:
        """The rows of these tokens, in their order."""
        return cls(torch.cat(list(embeddings.values())).float(), first)

    def count(self, table: int) -> int:
        """How many rows a table of this many ends up with."""
        return max(table, self.first + self.rows.shape[0])


def token_table(model: str) -> str:
    """The canonical name of a text encoder's token embeddings."""
    return f"{root(model)}embeddings.token_embedding.weight"


class Merger:
    """Gives every parameter of the merged model.

    Args:
        places: Where the base's parameters lie, by canonical name.
        parts: The adapters.
        rows: New tokens, by text encoder.
        dtype: For all floating-point parameters of the UNet and the text encoders; None keeps theirs.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        parts: Sequence[Part],
        rows: Mapping[str, TokenRows],
        dtype: torch.dtype | None,
    ) -> None:
        self.places = places
        self.dtype = dtype
        self._parts = parts
        self._rows = {token_table(model): each for model, each in rows.items()}
        self._touched = {f"{target}.weight" for _, adapter, _ in parts for target in adapter.factors} | set(self._rows)

    def with_places(self, places: Mapping[str, Place]) -> Merger:
        """The same changes to a base that has more parameters."""
        merger = copy(self)
        merger.places = places
        return merger

    def check(self) -> None:
        """Refuses targets and rows that do not fit, before anything is written."""
        shapes = Weights(self.places).shapes()
        for name, adapter, _ in self._parts:
            check_family(name, adapter, shapes)
            for target, factors in sorted(adapter.factors.items()):
                if f"{target}.weight" not in self.places:
                    raise CorruptError(target, "is no layer of this base", _FIX)
                fitted(target, factors, self.places[f"{target}.weight"].shape)
        for table, new in self._rows.items():
            if table not in self.places:
                raise CorruptError(table, "is missing from this base", "get the base again")
            shape = self.places[table].shape
            if len(shape) != 2 or new.rows.shape[1] != shape[1]:
                problem = f"token rows are {new.rows.shape[1]} wide, the base's table is {shape}"
                raise CorruptError("embeddings", problem, _FIX)

    def vocabulary(self, model: str) -> int | None:
        """How many rows a text encoder's table ends up with; None if it stays as it was."""
        table = token_table(model)
        return self._rows[table].count(self.places[table].shape[0]) if table in self._rows else None

    def layout(self, slot: Slot) -> tuple[str, tuple[int, ...]]:
        """The dtype (safetensors' name) and shape that a tensor of a file is written with."""
        shape = slot.shape
        if slot.names[0] in self._rows:
            shape = (self._rows[slot.names[0]].count(shape[0]), *shape[1:])
        return DTYPE_NAMES[self._dtype(slot)], shape

    def leaves(self, slot: Slot) -> bool:
        """Whether a tensor of the base's own file stays as it is."""
        return DTYPES[slot.dtype] == self._dtype(slot) and not self._touched.intersection(slot.names)

    def pieces(self, slot: Slot) -> Iterator[Tensor | Span]:
        """What a tensor of a file is written from: the base's bytes wherever nothing changes."""
        dtype = self._dtype(slot)
        for name in slot.names:
            place = self.places[name]
            same = DTYPES[place.entry.dtype] == dtype and place.transposed == slot.transposed
            if same and name not in self._touched:
                yield place.span
            else:
                merged = self._merged(name, dtype)
                yield merged.T if slot.transposed else merged

    def _dtype(self, slot: Slot) -> torch.dtype:
        dtype = DTYPES[slot.dtype]
        return self.dtype if self.dtype is not None and dtype.is_floating_point and is_target(slot.names[0]) else dtype

    def _merged(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.places[name].read()
        if name in self._rows:
            new = self._rows[name]
            merged = torch.zeros(new.count(tensor.shape[0]), tensor.shape[1], dtype=dtype)
            merged[: tensor.shape[0]] = tensor
            merged[new.first : new.first + new.rows.shape[0]] = new.rows
        elif name in self._touched:
            target = name.removesuffix(".weight")
            merged = self._change(target, tensor).add_(tensor).to(dtype)
        else:
            merged = tensor.to(dtype)
        if merged.is_floating_point() and not _finite(merged):
            raise CorruptError(name, f"is beyond the range of {dtype}", "merge with dtype float32, or smaller weights")
        return merged

    def _change(self, target: str, weight: Tensor) -> Tensor:
        """What the adapters add to a layer's weight, float32; a DoRA's part depends on the weight."""
        shape = tuple(weight.shape)
        doras = [part for part in self._parts if target in part[1].magnitudes]
        others = [part for part in self._parts if target in part[1].factors and part not in doras]
        change = fitted(target, summed(target, others), shape).delta() if others else torch.zeros(shape)
        for _, adapter, share in doras:
            fitting = fitted(target, adapter.factors[target], shape)
            change += share * dora_change(target, weight, fitting, adapter.magnitudes[target]).float()
        return change


def _finite(tensor: Tensor) -> bool:
    """By the extremes, which carry infinity and NaN: a twentieth of the time of asking every element."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
