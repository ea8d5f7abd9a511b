"""File formats of adapters: one file each, with `parse` and, where we write it, its inverse `render`.

Which one a file is of is told by its header alone, see `adapters.recognition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import cloneofsimo, diffusers, embeddings, kohya, native, peft, pickles
from lora_pipeline.adapters.header import is_pickle
from lora_pipeline.adapters.recognition import CLONEOFSIMO, DIFFUSERS, EMBEDDINGS, KOHYA, NATIVE, PEFT, recognise
from lora_pipeline.adapters.storage import read_tensors, write_tensors
from lora_pipeline.errors import CorruptError, UsageError

# Reads the adapter out of a file's tensors and metadata; raises CorruptError naming the tensor or key at fault.
Parse = Callable[[Mapping[str, Tensor], Mapping[str, str]], Adapter]
# The tensors and metadata of the file that `parse` reads back; raises CorruptError for what the format cannot hold.
Render = Callable[[Adapter], tuple[dict[str, Tensor], dict[str, str]]]

READERS: dict[str, Parse] = {
    NATIVE: native.parse,
    DIFFUSERS: diffusers.parse,
    PEFT: peft.parse,
    KOHYA: kohya.parse,
    CLONEOFSIMO: cloneofsimo.parse,
    EMBEDDINGS: embeddings.parse,
}
WRITERS: dict[str, Render] = {
    NATIVE: native.render,
    DIFFUSERS: diffusers.render,
    PEFT: peft.render,
    KOHYA: kohya.render,
    CLONEOFSIMO: cloneofsimo.render,
    "learned_embeds": embeddings.render_learned_embeds,
    "emb_params": embeddings.render_emb_params,
    pickles.A1111: pickles.render_a1111,
}
# How the formats that are no safetensors files are put on disk.
_FILES = {pickles.A1111: pickles.write_a1111, PEFT: peft.write_folder}


def load(path: Path, *, allow_pickle: bool = False) -> Adapter:
    """Reads an adapter of any known format; see `lora_pipeline.adapters.load_adapter`."""
    read = peft.read_folder if path.is_dir() else read_tensors
    if allow_pickle and is_pickle(path):
        read = pickles.read_tensors_of_pickle
    tensors, metadata = read(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    form = PEFT if path.is_dir() else recognise(shapes, metadata)
    if form not in READERS:
        example = min(tensors, default="no tensor at all")
        problem = f"is no adapter of a known format ({example:.100})"
        raise CorruptError(str(path), problem, f"give an adapter of one of the formats {', '.join(READERS)}")
    try:
        return embeddings.named(READERS[form](tensors, metadata), path.stem.strip() or embeddings.UNNAMED)
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
    _FILES.get(form, write_tensors)(path, tensors, metadata)
