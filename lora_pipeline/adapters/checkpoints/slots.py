"""What the tensors of a file are, and where the parameters of a model lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_pipeline.adapters.checkpoints.vae_names import is_attention_weight
from lora_pipeline.adapters.header import TensorEntry
from lora_pipeline.adapters.storage import Span, read_tensor
from lora_pipeline.errors import CorruptError

OTHER = "other."  # what no model has a parameter for: the canonical name of such a tensor is this and its key


@dataclass(frozen=True)
class Slot:
    """One tensor of a file.

    Args:
        names: The canonical names of the parameters in it; several share it row by row, in equal parts.
        shape: As the file stores it.
        dtype: safetensors' name.
        transposed: Whether the file stores it so.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False


@dataclass(frozen=True)
class Place:
    """Where one parameter lies: a whole tensor of a file or some rows of it."""

    path: Path
    entry: TensorEntry
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's own shape, whatever the file makes of it."""
        return self.entry.shape[::-1] if self.transposed else self.entry.shape

    @property
    def span(self) -> Span:
        """Its bytes, as stored."""
        return Span(self.path, self.entry.start, self.entry.stop)

    def read(self) -> Tensor:
        """The parameter in the dtype it is stored in."""
        with self.path.open("rb") as file:
            tensor = read_tensor(file, self.entry)
        return tensor.T if self.transposed else tensor


def placed(path: Path, entries: Mapping[str, TensorEntry], slots: Mapping[str, Slot]) -> dict[str, Place]:
    """The place of each parameter in a file.

    Raises:
        CorruptError: Two tensors are the same parameter, or one does not divide into its parts.
    """
    places: dict[str, Place] = {}
    for key, slot in slots.items():
        entry, parts = entries[key], len(slot.names)
        if parts > 1 and (not entry.shape or entry.shape[0] % parts):
            raise CorruptError(f"{path}: {key}", f"its shape {entry.shape} is not {parts} equal parts", "get it again")
        for index, name in enumerate(slot.names):
            if name in places:
                raise CorruptError(f"{path}: {key}", f"is another {name}", "get the file again")
            places[name] = Place(path, _part(name, entry, index, parts), slot.transposed)
    return places


def _part(name: str, entry: TensorEntry, index: int, parts: int) -> TensorEntry:
    shape, size = entry.shape, (entry.stop - entry.start) // parts
    if parts > 1:
        shape = (shape[0] // parts, *shape[1:])
    if is_attention_weight(name) and shape[2:] and set(shape[2:]) == {1}:
        shape = shape[:2]
    return TensorEntry(entry.dtype, shape, entry.start + index * size, entry.start + (index + 1) * size)
