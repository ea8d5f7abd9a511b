"""Tells MLflow what a stage does, without ever slowing or breaking it.

Events go to a spool file and a queue; a background thread imports MLflow and delivers them in batches. When the store
cannot be reached the stage goes on, one warning is given, and the spool stays.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lora_pipeline.errors import Stopped
from lora_pipeline.tracking.store import Event, Identity, deliver

SWITCH = "LORA_PIPE_TRACKING"
PATIENCE = 30.0  # seconds a finished stage waits for delivery; the very first one waits for MLflow to make its tables

logger = logging.getLogger(__name__)


class Tracker:
    """What a stage may report. Every call returns at once and never raises."""

    def __init__(self, spool: Path | None) -> None:
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.spool = spool

    def params(self, values: Mapping[str, object]) -> None:
        """Log what the stage was asked for."""
        for name, value in values.items():
            self._put(Event("param", name, str(value), 0))

    def metric(self, name: str, value: float, step: int) -> None:
        """Log a number measured at `step`."""
        self._put(Event("metric", name, float(value), step))

    def artifact(self, path: Path) -> None:
        """Log the file `path`, which must stay until the stage ends."""
        self._put(Event("artifact", path.name, str(path.absolute()), 0))

    def tag(self, name: str, value: str) -> None:
        """Log a word about the run."""
        self._put(Event("tag", name, value, 0))

    def _put(self, event: Event) -> None:
        if self.spool is None:
            return
        try:
            with self.spool.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event.__dict__) + "\n")
        except OSError:  # a full disk is the stage's to report
            return
        self.events.put(event)


@contextmanager
def track(stage: str, instance: str, root: Path) -> Iterator[Tracker]:
    """A tracker for one run of `stage@instance` of the project at `root`; `LORA_PIPE_TRACKING=off` mutes it."""
    if os.environ.get(SWITCH, "").lower() == "off":
        yield Tracker(None)
        return
    folder = root / ".work" / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder / f"{stage}-{instance}-{uuid.uuid4().hex[:8]}.jsonl")
    identity = Identity(stage, instance, root.absolute())
    failure: list[BaseException] = []

    def run() -> None:
        try:
            deliver(identity, tracker.events)
        except Exception as error:  # noqa: BLE001 - whatever a store does, it is not the stage's fault
            failure.append(error)

    thread = threading.Thread(target=run, name="tracking", daemon=True)
    thread.start()
    try:
        yield tracker
    except BaseException as error:
        status = "KILLED" if isinstance(error, Stopped) else "FAILED"
        tracker.events.put(Event("end", "status", status, 0))
        _settle(thread, tracker, failure)
        raise
    tracker.events.put(Event("end", "status", "FINISHED", 0))
    _settle(thread, tracker, failure)


def _settle(thread: threading.Thread, tracker: Tracker, failure: list[BaseException]) -> None:
    thread.join(PATIENCE)
    assert tracker.spool is not None
    if thread.is_alive() or failure:
        reason = failure[0] if failure else f"no answer in {PATIENCE:.0f} s"
        logger.warning("tracking: not delivered (%s); kept in %s", str(reason).splitlines()[0], tracker.spool)
    else:
        tracker.spool.unlink(missing_ok=True)
