"""File formats of adapters: one file each, with `parse` and, where we write it, its inverse `render`.

Which one a file is of is told by its header alone, see `adapters.recognition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import diffusers, kohya, native, peft
from lora_pipeline.adapters.recognition import DIFFUSERS, KOHYA, NATIVE, PEFT, recognise
from lora_pipeline.adapters.storage import read_tensors, write_tensors
from lora_pipeline.errors import CorruptError, UsageError

# Reads the adapter out of a file's tensors and metadata; raises CorruptError naming the tensor or key at fault.
Parse = Callable[[Mapping[str, Tensor], Mapping[str, str]], Adapter]
# The tensors and metadata of the file that `parse` reads back; raises CorruptError for what the format cannot hold.
Render = Callable[[Adapter], tuple[dict[str, Tensor], dict[str, str]]]

READERS: dict[str, Parse] = {
    NATIVE: native.parse, DIFFUSERS: diffusers.parse, PEFT: peft.parse, KOHYA: kohya.parse,
}  # fmt: skip
WRITERS: dict[str, Render] = {
    NATIVE: native.render, DIFFUSERS: diffusers.render, PEFT: peft.render, KOHYA: kohya.render,
}  # fmt: skip


def load(path: Path) -> Adapter:
    """Reads an adapter of any known format; see `lora_pipeline.adapters.load_adapter`."""
    folder = path.is_dir()
    tensors, metadata = peft.read_folder(path) if folder else read_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    form = PEFT if folder else recognise(shapes, metadata)
    if form not in READERS:
        example = min(tensors, default="no tensor at all")
        problem = f"is no adapter of a known format ({example:.100})"
        raise CorruptError(str(path), problem, f"give an adapter of one of the formats {', '.join(READERS)}")
    try:
        return READERS[form](tensors, metadata)
    except CorruptError as error:
        raise CorruptError(f"{path}: {error.where}", error.problem, error.fix) from None


def save(adapter: Adapter, path: Path, form: str = NATIVE) -> None:
    """Writes an adapter; see `lora_pipeline.adapters.save_adapter`.

    Raises:
        UsageError: A format that is not written.
    """
    if form not in WRITERS:
        raise UsageError(form, "is no format that is written", f"use one of {', '.join(WRITERS)}")
    tensors, metadata = WRITERS[form](adapter)
    write = peft.write_folder if form == PEFT else write_tensors
    write(path, tensors, metadata)
