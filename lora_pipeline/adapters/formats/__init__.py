"""File formats of adapters: one file each, with `recognises`, `parse` and `render`, told apart by the header alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import diffusers, native
from lora_pipeline.adapters.storage import read_tensors, write_tensors
from lora_pipeline.errors import CorruptError


class Format(Protocol):
    """What a module of this package offers."""

    NAME: str

    def recognises(self, names: Collection[str], metadata: Mapping[str, str], /) -> bool:
        """Whether a file with these tensor names and this metadata is of the format."""
        ...

    def parse(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
        """The adapter that a file holds; raises CorruptError naming the tensor or key at fault."""
        ...

    def render(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and metadata of the file that `parse` reads back."""
        ...


FORMATS: tuple[Format, ...] = (diffusers, native)


def load(path: Path) -> Adapter:
    """Reads an adapter of any known format; see `lora_pipeline.adapters.load_adapter`."""
    tensors, metadata = read_tensors(path)
    for form in FORMATS:
        if form.recognises(tensors.keys(), metadata):
            break
    else:
        known = " or ".join(form.NAME for form in FORMATS)
        example = min(tensors, default="no tensor at all")
        raise CorruptError(str(path), f"is no adapter of a known format ({example:.100})", f"give a {known} adapter")
    try:
        return form.parse(tensors, metadata)
    except CorruptError as error:
        raise CorruptError(f"{path}: {error.where}", error.problem, error.fix) from None


def save(adapter: Adapter, path: Path, form: Format = native) -> None:
    """Writes an adapter; see `lora_pipeline.adapters.save_adapter`."""
    tensors, metadata = form.render(adapter)
    write_tensors(path, tensors, metadata)
