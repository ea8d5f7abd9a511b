"""The header of a safetensors file, read without torch and trusted in nothing.

Layout: a little-endian u64 (the header's length), that many bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors, section Format). That library lets duplicate JSON keys pass; this does not.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_pipeline.errors import CorruptError, MissingError

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 8
BYTES_PER_ELEMENT = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_METADATA = "__metadata__"
_FIX = "get the file again, or make it again"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's place: `start` and `stop` are byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """Everything a file says about itself before its data."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks a header; touches no tensor data.

    Raises:
        MissingError: No such file.
        CorruptError: Not a safetensors file, or one whose header contradicts its size or itself.
    """
    size = regular_file_size(path)
    with path.open("rb") as file:
        beginning = file.read(8)
        _refuse_other_kinds(path, beginning)
        length = struct.unpack("<Q", beginning)[0]
        if length > MAX_HEADER_BYTES:
            raise CorruptError(str(path), f"is no safetensors file: a header of {length} bytes is announced", _FIX)
        if 8 + length > size:
            raise CorruptError(str(path), f"is truncated: {size} bytes, the header alone needs {8 + length}", _FIX)
        fields = _parse_json(path, file.read(length))
    metadata = _metadata(path, fields.pop(_METADATA, {}))
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in fields.items()}
    _check_tiling(path, tensors, 8 + length, size)
    return Header(tensors, metadata)


def regular_file_size(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
        MissingError: No such file.
        CorruptError: A folder, or a device, pipe or socket.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(str(path), "no such file", "check the path, or run the stage that makes it") from None
    if stat.S_ISDIR(status.st_mode):
        raise CorruptError(str(path), "is a folder, not a safetensors file", "give a file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise CorruptError(str(path), "is not a regular file", "give a safetensors file")
    return status.st_size


def _refuse_other_kinds(path: Path, beginning: bytes) -> None:
    if not beginning:
        raise CorruptError(str(path), "is empty", _FIX)
    if beginning.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        problem = "is a pickle (.pt, .bin, .ckpt), which can run code when it is read"
        fix = "get the safetensors version of it, or trust it: lora-pipe convert IN OUT --allow-pickle"
        raise CorruptError(str(path), problem, fix)
    if len(beginning) < 8:
        raise CorruptError(str(path), f"is truncated: {len(beginning)} bytes", _FIX)


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CorruptError(str(path), "is no safetensors file: its header is not JSON", _FIX)
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptError(str(path), f"its header is not valid: {error}", _FIX) from None
    if not isinstance(fields, dict):
        raise CorruptError(str(path), "its header is not a JSON object", _FIX)
    return fields


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"duplicate key {name!r}")
        fields[name] = value
    return fields


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptError(str(path), "its metadata is not text by text", _FIX)
    return metadata


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    where = f"{path}: {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptError(where, "its entry needs exactly dtype, shape and data_offsets", _FIX)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_PER_ELEMENT:
        raise CorruptError(where, f"unknown dtype {dtype!r}", f"use one of {', '.join(BYTES_PER_ELEMENT)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise CorruptError(where, f"its shape {shape!r:.80} or offsets {offsets!r:.80} cannot be", _FIX)
    start, stop = offsets
    expected = math.prod(shape) * BYTES_PER_ELEMENT[dtype]
    if stop - start != expected:
        raise CorruptError(where, f"has {stop - start} bytes, {dtype} {shape} needs {expected}", _FIX)
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _check_tiling(path: Path, tensors: dict[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            kind = "overlaps another tensor" if entry.start < position else "leaves a hole before it"
            raise CorruptError(f"{path}: {name}", f"its data {kind}", _FIX)
        position = entry.stop
    if position != size:
        kind = "is truncated" if position > size else "has bytes after its last tensor"
        raise CorruptError(str(path), f"{kind}: {size} bytes, its header describes {position}", _FIX)
