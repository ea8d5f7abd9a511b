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
from typing import Any, BinaryIO

from lora_pipeline.errors import CorruptError, MissingError

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 8
_MAX_NUMBERS = 2**48
BYTES_PER_ELEMENT = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_ZIP = b"PK\x03\x04"
_ZIP_NAME = 512  # enough of a zip archive to read its first file's name
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
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
        _refuse_other_kinds(path, beginning, file)
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


def _refuse_other_kinds(path: Path, beginning: bytes, file: BinaryIO) -> None:
    """Says what it is where it is something people mistake for a safetensors file."""
    if not beginning:
        raise CorruptError(str(path), "is empty", _FIX)
    if _begins_pickle(beginning, file):
        problem = "is a pickle (.pt, .bin, .ckpt), which can run code when it is read"
        fix = "get the safetensors version of it, or trust it: lora-pipe convert IN OUT --allow-pickle"
        raise CorruptError(str(path), problem, fix)
    if beginning.startswith(_ZIP):
        raise CorruptError(str(path), "is a zip archive", "unpack it, and give the safetensors file inside")
    if beginning.startswith(b"version "):
        problem = "is a git-lfs pointer: the place of a file, not the file"
        raise CorruptError(str(path), problem, "fetch the file itself: git lfs pull")
    if beginning.lstrip().lower().startswith((b"<!doc", b"<html", b"<?xml", b"<head")):
        problem = "is a web page: a site answered with words instead of the file"
        raise CorruptError(str(path), problem, "download it again, logged in if the site asks for it")
    if len(beginning) < 8:
        raise CorruptError(str(path), f"is truncated: {len(beginning)} bytes", _FIX)


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle, bare or in an archive as torch writes it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _begins_pickle(file.read(8), file)


def _begins_pickle(beginning: bytes, file: BinaryIO) -> bool:
    if beginning.startswith(_ZIP):
        return _holds_pickle(file.read(_ZIP_NAME))
    a_length = beginning[3:] == bytes(5)  # a header of 640, 896, 1152 or 1408 bytes begins like a pickle
    return beginning.startswith(_PICKLES) and not a_length


def _holds_pickle(rest: bytes) -> bool:
    """Whether a zip archive is one of torch's, by its first file's name.

    Args:
        rest: What follows the archive's first 8 bytes (APPNOTE.TXT 4.3.7: the name's length at 26, the name at 30).
    """
    length = int.from_bytes(rest[18:20], "little")
    name = rest[22 : 22 + length]
    return name.endswith((b"/data.pkl", b"/.format_version", b"/byteorder", b"/version"))


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
    if math.prod(max(length, 1) for length in shape) >= _MAX_NUMBERS:  # no bytes, and yet beyond what torch counts
        raise CorruptError(where, f"its shape {shape!r:.80} cannot be", _FIX)
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
