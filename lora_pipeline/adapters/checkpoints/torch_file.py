"""`.ckpt` files for old user interfaces, written as torch's zip without holding the model in memory.

An uncompressed zip: `archive/data.pkl` is the pickle of {"state_dict": {name: tensor}}, whose tensors refer by number
to the members `archive/data/0`, ... Source: torch/csrc/jit/serialization/pickler and torch/serialization.py, `_save`.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from lora_pipeline.adapters.storage import DTYPES, Pieces, piece_bytes, tensor_size, written_whole
from lora_pipeline.errors import CorruptError, MissingError

NOTE = "archive/extra/lora_pipeline.json"
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_PADDING_ID = b"FB"  # what torch marks its own padding with
_MOST_NOTE = 16 * 1024 * 1024
_STORAGES: dict[str, Any] = {
    "BOOL": torch.BoolStorage, "U8": torch.ByteStorage, "I8": torch.CharStorage, "I16": torch.ShortStorage,
    "I32": torch.IntStorage, "I64": torch.LongStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage,
    "F32": torch.FloatStorage, "F64": torch.DoubleStorage,
}  # fmt: skip

Layout = Mapping[str, tuple[str, tuple[int, ...]]]


def stream_torch_file(path: Path, layout: Layout, note: str | None, produce: Callable[[str], Pieces]) -> None:
    """Writes a file that `torch.load(weights_only=True)` reads; every byte is decided by the arguments.

    Args:
        path: Where to write.
        layout: Each tensor's dtype (safetensors' name for it) and shape.
        note: Text kept in the member `NOTE`, which can be read without opening the pickle.
        produce: As in `stream_tensors`.

    Raises:
        CorruptError: A dtype that these files have no storage for.
        ResourceError: No space left; an older file of that name stays as it was.
    """
    for name, (dtype, _) in layout.items():
        if dtype not in _STORAGES:
            raise CorruptError(name, f"is {dtype}, which .ckpt files cannot hold", "write a .safetensors file")
    with written_whole(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, "archive/data.pkl", [_pickled(layout)])
        _write(archive, "archive/byteorder", [b"little"])
        _write(archive, "archive/version", [b"3\n"])
        if note is not None:
            _write(archive, NOTE, [note.encode()])
        for index, name in enumerate(sorted(layout)):
            size = _write(archive, f"archive/data/{index}", piece_bytes(produce(name)), tensor_size(layout[name]))
            if size != tensor_size(layout[name]):
                raise ValueError(f"{name}: {size} bytes, not the layout's {layout[name]}")


def read_note(path: Path) -> str | None:
    """The note of such a file, or None where there is none; no pickle is opened.

    Raises:
        MissingError: No such file.
        CorruptError: No zip, or a note that is no text.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if NOTE not in archive.namelist():
                return None
            with archive.open(NOTE) as file:
                return file.read(_MOST_NOTE).decode("utf-8")
    except FileNotFoundError:
        raise MissingError(str(path), "no such file", "check the path") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError):
        raise CorruptError(str(path), "is no torch file", "get the file again") from None


def _write(archive: zipfile.ZipFile, name: str, chunks: Any, size: int = 0) -> int:
    member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    member.create_system, member.file_size = 3, size
    start = archive.start_dir + _LOCAL_HEADER + len(name) + 4
    padding = -start % _ALIGNMENT
    member.extra = struct.pack("<2sH", _PADDING_ID, padding) + b"Z" * padding
    with archive.open(member, "w") as file:
        return sum(file.write(data) for data in chunks)


@dataclass(frozen=True)
class _Storage:
    identity: tuple[str, Any, str, str, int]


@dataclass(frozen=True)
class _Stored:
    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, tuple(stride), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        return thing.identity if isinstance(thing, _Storage) else None


def _pickled(layout: Layout) -> bytes:
    tensors = {}
    for index, name in enumerate(sorted(layout)):
        dtype, shape = layout[name]
        elements = tensor_size(layout[name]) // DTYPES[dtype].itemsize
        tensors[name] = _Stored(_Storage(("storage", _STORAGES[dtype], str(index), "cpu", elements)), shape)
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({"state_dict": tensors})
    return buffer.getvalue()
