"""State that survives SIGKILL: whole generations, and a pointer that names the last of them.

    work/LATEST                          generation-0000000150
    work/generation-0000000150/state.safetensors
    work/generation-0000000150/position.json

A generation is written under another name and renamed, then the pointer is replaced, then older ones go: at every
instant the pointer names a whole generation.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_pipeline.adapters.storage import disk_errors, read_tensors, write_tensors
from lora_pipeline.errors import CorruptError, MissingError

POINTER = "LATEST"
GENERATION = "generation-"


@dataclass(frozen=True)
class Position:
    """How far a run is: `step` steps of phase number `phase` are done.

    Args:
        phase: From 0.
        step: How many.
        plan: The steps of every phase.
        rest: JSON of what else the next step depends on, see `Learner.state`.
    """

    phase: int
    step: int
    plan: tuple[int, ...] = ()
    rest: Any = None


def save_checkpoint(work: Path, done: int, position: Position, tensors: Mapping[str, Tensor]) -> None:
    """Writes a generation and removes older ones.

    Args:
        work: An existing folder.
        done: Steps done over all phases; names the generation.
        position: Where to go on.
        tensors: Everything else.

    Raises:
        ResourceError: No space left; the previous generation stays.
    """
    name = f"{GENERATION}{done:010}"
    partial = work / f".{name}.partial"
    with disk_errors(work):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write_tensors(partial / "state.safetensors", tensors, {})
            _write_text(partial / "position.json", json.dumps(asdict(position), sort_keys=True))
            shutil.rmtree(work / name, ignore_errors=True)  # left by a run that died before it moved the pointer
            partial.rename(work / name)
            _write_text(work / f".{POINTER}.partial", name)
            (work / f".{POINTER}.partial").replace(work / POINTER)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    for old in work.glob(f"{GENERATION}*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(work: Path) -> tuple[Position, dict[str, Tensor]] | None:
    """The last whole generation, or None where there is none.

    Raises:
        CorruptError: What the pointer names is not there or damaged.
    """
    pointer = work / POINTER
    if not pointer.is_file():
        return None
    fix = f"remove the folder {work} to start over"
    name = pointer.read_text("utf-8", errors="replace").strip()
    if not name.startswith(GENERATION) or Path(name).name != name:
        raise CorruptError(str(pointer), f"names no checkpoint: {name!r:.60}", fix)
    try:
        position = json.loads((work / name / "position.json").read_text("utf-8"))
        tensors, _ = read_tensors(work / name / "state.safetensors")
        plan = tuple(map(int, position["plan"]))
        return Position(int(position["phase"]), int(position["step"]), plan, position["rest"]), tensors
    except (CorruptError, MissingError) as error:
        raise CorruptError(error.where, error.problem, fix) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(str(work / name), f"cannot be read: {error!r:.100}", fix) from None


def check_space(work: Path, size: int) -> None:
    """Makes the folder, and refuses one that cannot be written to or has no room for two checkpoints of `size` bytes.

    Raises:
        ResourceError: No space left.
        MissingError: The folder cannot be written to.
    """
    probe = work / ".probe"
    with disk_errors(work):
        try:
            work.mkdir(parents=True, exist_ok=True)
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 2 * max(size, 1))
        finally:
            probe.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
