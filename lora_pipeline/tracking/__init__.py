"""Tells MLflow what a stage does, without ever slowing or breaking it.

A stage only appends lines to a spool in `.work/tracking`; a process of its own, the courier, brings them to the store
and removes the spool. What could not be delivered stays, and the next courier tries again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from lora_pipeline.errors import Stopped
from lora_pipeline.tracking.spool import Event, Identity, Spool, group_name, spools_of

SWITCH = "LORA_PIPE_TRACKING"

logger = logging.getLogger(__name__)


class Tracker:
    """What a stage may report. Every call returns at once and never raises."""

    def __init__(self, spool: Spool | None, events: TextIO | None) -> None:
        self.spool = spool
        self.events = events

    def params(self, values: Mapping[str, object]) -> None:
        """Log what the stage was asked for."""
        for name, value in values.items():
            self._put("param", name, str(value))

    def metric(self, name: str, value: float, step: int) -> None:
        """Log a number measured at `step`."""
        self._put("metric", name, float(value), step)

    def artifact(self, path: Path) -> None:
        """Log the small file `path` as it is now."""
        if self.spool is None:
            return
        try:
            self.spool.files.mkdir(exist_ok=True)
            shutil.copyfile(path, self.spool.files / path.name)
        except OSError:
            return
        self._put("artifact", path.name, path.name)

    def tag(self, name: str, value: str) -> None:
        """Log a word about the run."""
        self._put("tag", name, value)

    def ended(self, status: str) -> None:
        """Log the last event: `status` is one of MLflow's."""
        self._put("end", "status", status)

    def _put(self, kind: str, name: str, value: float | str, step: int = 0) -> None:
        if self.events is None:
            return
        event = Event(kind, name, value, step, int(time.time() * 1000))
        try:
            self.events.write(json.dumps(asdict(event)) + "\n")
            self.events.flush()
        except (OSError, ValueError):  # a full disk is the stage's to report; a later flush may fail again
            return


@contextmanager
def track(stage: str, instance: str, root: Path) -> Iterator[Tracker]:
    """A tracker for one run of `stage@instance` of the project at `root`; `LORA_PIPE_TRACKING=off` mutes it."""
    if os.environ.get(SWITCH, "").lower() == "off":
        yield Tracker(None, None)
        return
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.absolute() / 'mlflow.db'}"
    spool = Spool(spools_of(root.absolute()) / f"{stage}-{instance}-{uuid.uuid4().hex[:8]}")
    try:
        spool.folder.mkdir(parents=True)
        events = spool.events.open("a", encoding="utf-8")
        fcntl.flock(events, fcntl.LOCK_EX)  # held for as long as this process lives, however it ends
        spool.write_identity(Identity(stage, instance, str(root.absolute()), address, group_name()))
    except OSError as error:
        logger.warning("tracking: nothing is recorded (%s)", error)
        yield Tracker(None, None)
        return
    tracker = Tracker(spool, events)
    courier = send_courier(spool)
    try:
        yield tracker
    except BaseException as error:
        tracker.ended("KILLED" if isinstance(error, Stopped) else "FAILED")
        raise
    else:
        tracker.ended("FINISHED")
    finally:
        events.close()
        if has_failed(courier):
            logger.warning("tracking: not delivered (%s); kept in %s", spool.error, spool.folder)


def send_courier(spool: Spool) -> int:
    """Start the process that delivers, which outlives the stage by the seconds that MLflow takes; returns its id."""
    command = [sys.executable, "-m", "lora_pipeline.tracking.courier", str(spool.folder)]
    nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    return os.posix_spawn(sys.executable, command, os.environ, file_actions=nowhere, setsid=True)


def has_failed(courier: int) -> bool:
    """Whether the courier has ended, and badly."""
    try:
        ended, status = os.waitpid(courier, os.WNOHANG)
    except ChildProcessError:  # somebody else has asked
        return False
    return bool(ended and status)
