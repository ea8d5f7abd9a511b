"""Pickles (`.pt`, `.bin`, `.ckpt`), the one place where they are opened, and only for who asked for it.

Torch's weights-only unpickler builds tensors, containers, numbers and texts and calls nothing else. Around it: a bound
on the file's size, no compressed members (torch writes none, and a bomb needs them), and a check that tensors are no
larger than the file, which views with a stride of 0 could be. A child process would bound nothing further.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.adapters.header import regular_file_size
from lora_pipeline.adapters.storage import written_whole
from lora_pipeline.errors import CorruptError

LARGEST = 16 * 1024**3  # bytes
_MOST_MEMBERS = 100_000
_DEPTH = 4
_FIX = "get the safetensors version of it"


def read_pickle(path: Path) -> Any:
    """What a pickle holds: dicts, lists, tensors (contiguous, on the CPU), numbers, texts and None.

    Raises:
        MissingError: No such file.
        CorruptError: Not a whole pickle, too large, or one that needs code to be run.
    """
    size = regular_file_size(path)
    if size > LARGEST:
        raise CorruptError(str(path), f"has {size:,} bytes, the most that is read is {LARGEST:,}", _FIX)
    _check_members(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file makes it raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        problem = f"is no pickle of tensors alone ({reason[0]:.120})"
        raise CorruptError(str(path), problem, _FIX) from error
    return _checked(str(path), value, size, _DEPTH)


def write_pickle(path: Path, value: dict[str, Any]) -> None:
    """Writes what torch.load reads: the same value, the same bytes, whole or not at all.

    Raises:
        ResourceError, MissingError: See `storage.disk_errors`.
    """
    buffer = io.BytesIO()  # a file's name would get into the archive
    torch.save(value, buffer)
    with written_whole(path) as file:
        file.write(buffer.getbuffer())


def _check_members(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        members = zipfile.ZipFile(path).infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CorruptError(str(path), f"is a damaged archive ({error})", _FIX) from None
    if len(members) > _MOST_MEMBERS or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        problem = "is an archive with compressed or too many members, as torch writes none"
        raise CorruptError(str(path), problem, _FIX)


def _checked(where: str, value: Any, size: int, depth: int) -> Any:
    """The value, once it is known to be plain data; tensors are made contiguous."""
    if depth == 0:
        raise CorruptError(where, "is nested too deeply", _FIX)
    if isinstance(value, dict):
        return {key: _checked(f"{where}: {key!s:.80}", each, size, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(f"{where}: {index}", each, size, depth - 1) for index, each in enumerate(value)]
    if isinstance(value, Tensor):
        return _contiguous(where, value, size)
    if value is None or isinstance(value, str | int | float):
        return value
    raise CorruptError(where, f"holds a {type(value).__name__}, where tensors are expected", _FIX)


def _contiguous(where: str, tensor: Tensor, size: int) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        raise CorruptError(where, f"is a tensor of an unusual kind ({tensor.layout}, {tensor.dtype})", _FIX)
    if tensor.numel() * tensor.element_size() > size:
        raise CorruptError(where, f"claims {tensor.numel():,} numbers, more than the file has", _FIX)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise CorruptError(where, "holds NaN or infinity", "train again with a smaller learning rate")
    return tensor.detach().clone(memory_format=torch.contiguous_format)
