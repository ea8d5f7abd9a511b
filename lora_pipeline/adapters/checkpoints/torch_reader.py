"""What torch's zip files (`.ckpt`) hold and where, found without running or importing anything that they name.

The pickle inside is walked by Python's unpickler with every class and function replaced: tensors become their places,
ordered dictionaries stay, and whatever else a trainer saved beside its weights becomes an object that does nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lora_pipeline.adapters.header import (
    BYTES_PER_ELEMENT,
    Header,
    TensorEntry,
    is_pickle,
    read_header,
    regular_file_size,
)
from lora_pipeline.errors import CorruptError

_STORAGES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32",
    "DoubleStorage": "F64",
}  # fmt: skip
_LARGEST_PICKLE = 64 * 1024**2  # bytes; that of SDXL, the largest known, has half a megabyte
_LOCAL_HEADER = struct.Struct("<26xHH")
_FIX = "get the safetensors version of it"


def read_contents(path: Path) -> Header:
    """The tensors of a single file, whether safetensors or torch's zip; the latter has no metadata.

    Raises:
        MissingError, CorruptError: See `read_header`; also a pickle of something else than named tensors.
    """
    if not is_pickle(path):
        return read_header(path)
    if not zipfile.is_zipfile(path):
        problem = "is a bare pickle, as torch wrote before 1.6, or a damaged archive"
        raise CorruptError(str(path), problem, _FIX)
    size = regular_file_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return Header(_entries(path, archive, size), {})
    except (zipfile.BadZipFile, OSError, struct.error, NotImplementedError, RuntimeError) as error:
        raise CorruptError(str(path), f"is a damaged archive ({error})", _FIX) from None


def _entries(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, TensorEntry]:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CorruptError(str(path), "is an archive, and not one that torch wrote", _FIX)
    if archive.getinfo(pickles[0]).file_size > _LARGEST_PICKLE:
        raise CorruptError(str(path), f"has a pickle of over {_LARGEST_PICKLE:,} bytes", _FIX)
    try:
        value = _Walker(io.BytesIO(archive.read(pickles[0]))).load()
    except Exception as error:  # whatever a hostile file makes it raise
        raise CorruptError(str(path), f"is no pickle of tensors ({str(error)!r:.100})", _FIX) from error
    value = value.get("state_dict", value) if isinstance(value, dict) else value
    found = {key: each for key, each in value.items() if isinstance(each, _Tensor)} if isinstance(value, dict) else {}
    if not found or not all(isinstance(key, str) for key in found):
        raise CorruptError(str(path), "holds no tensors by name", _FIX)
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise CorruptError(str(path), "is of a machine of the other byte order", _FIX)
    starts: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        for tensor in found.values():
            name = f"{folder}data/{tensor.storage.key}"
            if name not in starts:
                starts[name] = _bytes_of(path, archive, file, name, size)
    return {
        key: _entry(f"{path}: {key}", tensor, *starts[f"{folder}data/{tensor.storage.key}"])
        for key, tensor in found.items()
    }


def _bytes_of(path: Path, archive: zipfile.ZipFile, file: Any, name: str, size: int) -> tuple[int, int]:
    """Where a member's bytes begin and end in the file."""
    if name not in archive.namelist():
        raise CorruptError(str(path), f"lacks its member {name}", _FIX)
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise CorruptError(str(path), "is an archive with compressed members, as torch writes none", _FIX)
    file.seek(member.header_offset)
    start = member.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
    if start + member.file_size > size:
        raise CorruptError(str(path), "is shorter than it says", _FIX)
    return start, start + member.file_size


def _entry(where: str, tensor: _Tensor, start: int, stop: int) -> TensorEntry:
    dtype, shape = tensor.storage.dtype, tensor.shape
    width = BYTES_PER_ELEMENT[dtype]
    rows = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    contiguous = all(stride == row for stride, row, side in zip(tensor.stride, rows, shape, strict=True) if side > 1)
    if not contiguous:
        raise CorruptError(where, "is a view that does not lie in one piece", _FIX)
    first = start + tensor.offset * width
    last = first + math.prod(shape) * width
    if last > stop:
        raise CorruptError(where, f"of shape {shape} is larger than its storage", _FIX)
    return TensorEntry(dtype, shape, first, last)


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Stands for every class and function that is none of ours: it can be called and filled, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Walker(pickle.Unpickler):
    """Builds containers, numbers, texts and the places of tensors; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        return _STORAGES.get(name, _Inert) if module in ("torch", "torch.storage") else _Inert

    def persistent_load(self, identity: Any) -> Any:
        kind, dtype, key, *_ = identity
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str):
            _refuse("a storage of an unknown kind")
        return _Storage(dtype, key)


def _rebuilt(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        _refuse("a tensor of an unknown kind")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        _refuse("a tensor of impossible numbers")
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(what)
