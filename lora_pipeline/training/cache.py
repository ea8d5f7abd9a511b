"""Tensors that were computed before, on disk, under a hash of everything they depend on.

An entry is a safetensors file that holds its key and a digest of its tensors: one that is damaged, or of something
else, is computed and written again. Entries appear whole and are never changed, so that several runs may share a
folder, and the folder may be removed at any time. When it has grown beyond its limit, those unused for longest go.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lora_pipeline.adapters.storage import read_tensors, tensor_bytes
from lora_pipeline.errors import CorruptError, MissingError

LIMIT = 4 * 2**30
Tensors = dict[str, Tensor]


class TensorCache:
    """A folder of entries.

    Args:
        folder: It need not exist; None remembers nothing.
        limit: Bytes that `shrink` leaves at most.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit

    def get(self, key: Callable[[], str], compute: Callable[[], Tensors]) -> tuple[Tensors, bool]:
        """The tensors of a key, and whether they were known.

        Args:
            key: Gives a hash of all that the tensors depend on; not asked where nothing is remembered.
            compute: Gives them where they are not known.
        """
        if self.folder is None:
            return compute(), False
        name = key()
        path = self.folder / name[:2] / f"{name}.safetensors"
        known = _read(path, name)
        if known is not None:
            return known, True
        made = compute()
        _write(path, name, made)
        return made, False

    def shrink(self) -> None:
        """Removes the entries that were unused for longest until the rest is within the limit."""
        found = []
        for path in self.folder.glob("*/*") if self.folder is not None else ():
            with suppress(OSError):  # another run may have removed it
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = 0
        for _, size, path in sorted(found, reverse=True):
            total += size
            if total > self.limit:
                path.unlink(missing_ok=True)


def key_of(*parts: str | Tensor) -> str:
    """A sha-256 over texts and tensors."""
    total = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, str) else _digest({"": part})
        total.update(f"{len(text)} {text}".encode())
    return total.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A sha-256 over a model's settings and weights, and what else its results' bytes depend on."""
    config: Any = getattr(model, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    told = {name: value for name, value in values.items() if not name.startswith("_")}  # a path, a version
    settings = json.dumps([type(model).__name__, told], sort_keys=True, default=str)
    device = next(model.parameters()).device.type
    place = f"{torch.__version__} {device} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    return key_of(settings, place, _digest(model.state_dict()))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor_bytes(tensor))
    return total.hexdigest()


def _read(path: Path, key: str) -> Tensors | None:
    try:
        tensors, metadata = read_tensors(path)
        os.utime(path)  # it is in use
    except (CorruptError, MissingError, OSError):
        return None
    sound = metadata.get("key") == key and metadata.get("sha256") == _digest(tensors)
    return tensors if sound else None


def _write(path: Path, key: str, tensors: Tensors) -> None:
    """No flush to the disk: the digest shows what a power failure left half. A full disk is for checkpoints to tell."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            partial.write_bytes(safetensors.torch.save(whole, {"key": key, "sha256": _digest(tensors)}))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
