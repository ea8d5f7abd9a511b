"""Outs that appear whole, one writer at a time, from inputs that held still.

DVC hashes inputs after a command ends and trusts whatever outs it finds, so a stage guards itself: it locks its outs,
builds them under other names, checks that what it read has not changed, and only then renames.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_pipeline.errors import BusyError, MissingError, ParamsError, UsageError

WORK = Path(".work")
FINISHED = "finished"  # in a work folder that is kept: its run ended, and its outs stand
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Keep:
    """Where a stage builds.

    building: a temporary sibling of each out, in the order of the outs; nothing is there yet.
    work: a folder for checkpoints, the same for the same inputs; it outlives a killed run and goes when the outs stand,
        see `kept`.
    """

    building: tuple[Path, ...]
    work: Path


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content(path: Path) -> list[tuple[str, str]]:
    """Relative name and sha256 of each file in `path` (a file or a folder), sorted.

    Raises:
        MissingError: There is no such file or folder.
    """
    if path.is_file():
        return [(path.name, file_digest(path))]
    if not path.is_dir():
        raise MissingError(str(path), "there is no such file or folder", "run the stage that makes it: dvc repro")
    files = sorted(p for p in path.rglob("*") if p.is_file() and counts(p.relative_to(path)))
    return [(p.relative_to(path).as_posix(), file_digest(p)) for p in files]


def counts(path: Path) -> bool:
    """Whether the file is content: not hidden, and not what Python compiles beside its sources."""
    return not path.name.startswith(".") and "__pycache__" not in path.parts


def content_key(section: object, inputs: Sequence[Path]) -> str:
    """A sha256 over JSON-like `section` and the contents of `inputs`."""
    return _key(section, [content(path) for path in inputs])


def _key(section: object, contents: list[list[tuple[str, str]]]) -> str:
    told = {"section": section, "inputs": contents}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def die_with_parent() -> None:
    """Be killed when the parent is: a killed `dvc` must not leave a writer behind that the next one races."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def locked(name: str, root: Path) -> Iterator[None]:
    """Hold the lock `name` of the project at `root`; the system lets go of it however the process ends.

    Raises:
        BusyError: Another process holds it.
    """
    folder = root / WORK / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / hashlib.sha256(name.encode()).hexdigest()[:16]).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(name, "another process is writing it", "wait for it to end, or stop it") from error
        yield


def discard(path: Path) -> None:
    """Remove a file or a folder, whichever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sibling(out: Path, purpose: str) -> Path:
    """A hidden name beside `out` with its suffix: `a/b.json` and `new` give `a/.b.new.json`."""
    return out.with_name(f".{out.stem}.{purpose}{out.suffix}")


def put_in_place(built: Path, out: Path) -> None:
    """Rename `built` to `out`. A folder cannot be renamed over another, so an old one steps aside first.

    Raises:
        UsageError: A file would take the place of a folder, and of everything in it.
    """
    if built.is_file() and out.is_dir():
        raise UsageError(str(out), "is a folder, and what is written is a file", f"write to {out / 'NAME'}")
    old = sibling(out, "old")
    discard(old)
    if out.is_dir():
        out.rename(old)
    built.replace(out)
    discard(old)


def recover(out: Path) -> None:
    """Undo a kill between the two renames of `put_in_place`."""
    old = sibling(out, "old")
    if old.exists() and not out.exists():
        old.rename(out)


@contextmanager
def kept(
    name: str, outs: Sequence[Path], inputs: Sequence[Path], section: Callable[[], object], root: Path,
    lasting: Callable[[], object] | None = None,
) -> Iterator[Keep]:  # fmt: skip
    """Build `outs` inside the block; they appear when it ends well, and stay as they were when it does not.

    Args:
        name: The stage instance, as `train@zorp`.
        outs: Files or folders to build.
        inputs: Files or folders that are read.
        section: Reads the parameters again; what it gave at the start must still hold at the end.
        root: The project's folder.
        lasting: The part of the parameters that work is kept for, where a run of others may go on from it. The work
            folder then stays when the outs stand, marked as `FINISHED`, until another of this name is finished.

    Raises:
        BusyError: Another process builds the same out, or another out from the same inputs.
        MissingError: An input is not there.
        ParamsError: The inputs or the parameters changed while the block ran.
    """
    with locked(str(outs[0].absolute()), root):
        for out in outs:
            recover(out)
            out.parent.mkdir(parents=True, exist_ok=True)
        contents = [content(path) for path in inputs]
        before = _key(section(), contents)
        place = before if lasting is None else _key(lasting(), contents)
        keep = Keep(tuple(sibling(out, "new") for out in outs), root / WORK / name.replace("@", "/") / place[:32])
        for path in keep.building:
            discard(path)
        # Two `dvc exp run --temp` write outs of their own, but the same inputs give them one work folder.
        with locked(str(keep.work), root):
            keep.work.mkdir(parents=True, exist_ok=True)
            try:
                yield keep
                if content_key(section(), inputs) != before:
                    fix = f"run it again: dvc repro {name}"
                    raise ParamsError(name, "its inputs or parameters changed while it ran; nothing was recorded", fix)
                for path, out in zip(keep.building, outs, strict=True):
                    put_in_place(path, out)
            finally:
                for path in keep.building:
                    discard(path)
            if lasting is None:
                shutil.rmtree(keep.work, ignore_errors=True)
            else:
                _finish(keep.work)


def _finish(work: Path) -> None:
    """Marks the work folder, and removes those that were marked before."""
    (work / FINISHED).touch()
    for other in work.parent.iterdir():
        if other != work and (other / FINISHED).exists():
            shutil.rmtree(other, ignore_errors=True)
