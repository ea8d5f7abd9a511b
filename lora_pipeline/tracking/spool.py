"""What a stage leaves for the courier: one folder a run, with who it is, what happened, and how much was delivered.

The stage holds a lock on the events while it lives, a courier on the identity while it delivers; the system lets go of
both when a process dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

GROUP_VARIABLE = "LORA_PIPE_GROUP"
GATHER_SECONDS = 1.0


@dataclass(frozen=True)
class Event:
    """kind: param | metric | artifact | tag | end. `time`: milliseconds since 1970."""

    kind: str
    name: str
    value: float | str
    step: int
    time: int


@dataclass(frozen=True)
class Identity:
    """Which run of which project the events are of, and which store they go to."""

    stage: str
    instance: str
    root: str
    address: str
    group: str | None


@dataclass(frozen=True)
class Sent:
    """The run that a store knows, and how many bytes of the events it has."""

    run: str
    position: int


@dataclass(frozen=True)
class Spool:
    """A run's folder."""

    folder: Path

    @property
    def events(self) -> Path:
        """One line an event."""
        return self.folder / "events.jsonl"

    @property
    def files(self) -> Path:
        """The folder of copied artifacts."""
        return self.folder / "files"

    @property
    def error(self) -> str:
        """Why the last courier failed."""
        path = self.folder / "error"
        return path.read_text(encoding="utf-8") if path.is_file() else "the courier died"

    def write_error(self, reason: str) -> None:
        """Say why a courier failed."""
        (self.folder / "error").write_text(reason, encoding="utf-8")

    def identity(self) -> Identity:
        """Whose events they are."""
        return Identity(**json.loads((self.folder / "run.json").read_text(encoding="utf-8")))

    def write_identity(self, identity: Identity) -> None:
        """Begin the spool; couriers pass over a folder without it."""
        (self.folder / "run.json").write_text(json.dumps(asdict(identity)), encoding="utf-8")

    def sent(self) -> Sent | None:
        """What is delivered; None before a store knows the run."""
        path = self.folder / "sent.json"
        return Sent(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def write_sent(self, sent: Sent) -> None:
        """Note what is delivered, so that no courier sends it again."""
        partial = self.folder / "sent.partial"
        partial.write_text(json.dumps(asdict(sent)), encoding="utf-8")
        partial.replace(self.folder / "sent.json")

    @contextmanager
    def owned(self) -> Iterator[bool]:
        """Whether this process is the one that delivers the spool, for the length of the block."""
        try:
            file = (self.folder / "run.json").open(encoding="utf-8")
        except OSError:  # delivered and removed meanwhile, or not begun
            yield False
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True

    def batches(self, position: int) -> Iterator[tuple[list[Event], int]]:
        """Whole lines from byte `position` on, about a second's at a time, and the byte after them, until the end.

        A stage that died without a last word is told as killed.
        """
        ended = False
        while not ended:
            alone = self._writer_is_gone()  # asked before reading, so that nothing it wrote is missed
            events, position = self._read(position)
            ended = any(event.kind == "end" for event in events)
            if alone and not ended:
                events.append(Event("end", "status", "KILLED", 0, int(time.time() * 1000)))
                ended = True
            if events:
                yield events, position
            if not ended:
                time.sleep(GATHER_SECONDS)

    def _read(self, position: int) -> tuple[list[Event], int]:
        with self.events.open("rb") as file:
            file.seek(position)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return [], position
        return [Event(**json.loads(line)) for line in whole.splitlines()], position + len(whole) + 1

    def _writer_is_gone(self) -> bool:
        with self.events.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return False
        return True


def spools_of(root: Path) -> Path:
    """The folder of a project's spools."""
    return root / ".work" / "tracking"


def group_name() -> str | None:
    """What this process belongs to: a group by name, a DVC experiment, or the `dvc` process above it."""
    named = os.environ.get(GROUP_VARIABLE) or os.environ.get("DVC_EXP_NAME")
    if named:
        return named
    import psutil

    for process in psutil.Process().parents():
        try:
            if any(Path(part).name == "dvc" for part in process.cmdline()[:3]):
                return f"{process.pid}-{int(process.create_time())}"
        except psutil.Error:
            return None
    return None
