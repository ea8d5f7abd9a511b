"""Tensors on disk: a safetensors file is read strictly and written with canonical bytes, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lora_pipeline.adapters.header import BYTES_PER_ELEMENT, TensorEntry, read_header
from lora_pipeline.errors import CorruptError, MissingError, ResourceError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_AT_ONCE = 128 * 1024  # Linux takes three times as long over writes of a megabyte
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Span:
    """Bytes of a file, to be copied as they are: offsets `start` to `stop`."""

    path: Path
    start: int
    stop: int


Pieces = Iterable[Tensor | Span]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a small file whole: its tensors by name, and its metadata.

    Raises:
        MissingError: No such file.
        CorruptError: See `read_header`; also a NaN or an infinity in a tensor.
    """
    header = read_header(path)
    with path.open("rb") as file:
        tensors = {name: read_tensor(file, entry) for name, entry in header.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CorruptError(f"{path}: {name}", "holds NaN or infinity", "train again with a smaller learning rate")
    return tensors, header.metadata


def read_tensor(file: BinaryIO, entry: TensorEntry) -> Tensor:
    """Reads one tensor of an open file; the header must have been checked."""
    file.seek(entry.start)
    data = bytearray(file.read(entry.stop - entry.start))
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in row order, as they are stored."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def piece_bytes(pieces: Pieces) -> Iterator[memoryview]:
    """The bytes of tensors and spans one after the other; each is valid until the next is asked for."""
    buffer = memoryview(bytearray(_AT_ONCE))
    for piece in pieces:
        if isinstance(piece, Tensor):
            data = memoryview(tensor_bytes(piece))
            yield from (data[start : start + _AT_ONCE] for start in range(0, len(data), _AT_ONCE))
            continue
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.start)
            left = piece.stop - piece.start
            while left and (size := file.readinto(buffer[: min(left, _AT_ONCE)])):
                left -= size
                yield buffer[:size]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file of which every byte is decided by the arguments, and not by their order.

    Raises:
        ResourceError: No space left; an older file of that name stays as it was.
    """
    layout = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(path, layout, metadata, lambda name: [tensors[name]])


def stream_tensors(
    path: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    produce: Callable[[str], Pieces],
) -> None:
    """As `write_tensors`, with one tensor in memory at a time.

    Args:
        path: Where to write.
        layout: Each tensor's dtype (safetensors' name for it) and shape.
        metadata: Text by text.
        produce: Gives what the tensor of a name is made of, row after row; called once for each.
    """
    # wider elements first, so that every tensor stays aligned
    names = sorted(layout, key=lambda name: (-BYTES_PER_ELEMENT[layout[name][0]], name))
    with written_whole(path) as file:
        file.write(_header_bytes(names, layout, metadata))
        for name in names:
            size = sum(file.write(data) for data in piece_bytes(produce(name)))
            if size != tensor_size(layout[name]):
                raise ValueError(f"{name}: {size} bytes, not the layout's {layout[name]}")


def tensor_size(place: tuple[str, tuple[int, ...]]) -> int:
    """How many bytes a tensor of a dtype (safetensors' name) and shape has."""
    dtype, shape = place
    return math.prod(shape) * BYTES_PER_ELEMENT[dtype]


def _header_bytes(
    names: list[str], layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        dtype, shape = layout[name]
        stop = position + tensor_size(layout[name])
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Says clearly what went wrong while something was written.

    Raises:
        ResourceError: No space left.
        MissingError: The place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ResourceError(str(path), "no space left on the disk", "free some space and run again") from error
        raise MissingError(str(path), f"cannot be written: {error.strerror}", "give a path you may write to") from error


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when the block ends well, and not before.

    Raises:
        ResourceError, MissingError: See `disk_errors`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
