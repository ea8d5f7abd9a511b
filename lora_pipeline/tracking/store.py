"""Where tracked events go: an MLflow store, with one parent run a `dvc repro` and one child a stage that ran."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "lora-pipeline"
GROUP = "lora.group"
GROUP_VARIABLE = "LORA_PIPE_GROUP"
CONNECT_SECONDS = 2.0
GATHER_SECONDS = 2.0
BATCH = 500
LONGEST_PARAM = 6000
FORBIDDEN = re.compile(r"[^\w./ -]")  # in a name, MLflow says


@dataclass(frozen=True)
class Event:
    """kind: param | metric | artifact | tag | end."""

    kind: str
    name: str
    value: float | str
    step: int


@dataclass(frozen=True)
class Identity:
    """Which run of which project the events are of."""

    stage: str
    instance: str
    root: Path


def deliver(identity: Identity, events: queue.SimpleQueue[Event | None]) -> None:
    """Deliver `events` until one of kind `end` comes. Raises whatever the store raises."""
    client, experiment = open_store(identity.root)
    run = start_run(client, experiment, identity)
    done = False
    while not done:
        batch = gathered(events)
        done = any(event.kind == "end" for event in batch)
        send(client, run, batch)
        for event in batch:
            if event.kind == "end":
                client.set_terminated(run, status=str(event.value))


def gathered(events: queue.SimpleQueue[Event | None]) -> list[Event]:
    """Events of about two seconds, fewer when the last has come."""
    batch: list[Event] = []
    deadline = time.monotonic() + GATHER_SECONDS
    while len(batch) < BATCH and (remaining := deadline - time.monotonic()) > 0:
        try:
            event = events.get(timeout=remaining)
        except queue.Empty:
            break
        if event is not None:
            batch.append(event)
            if event.kind == "end":
                break
    return batch


def allowed(name: str) -> str:
    """The name, in the characters that MLflow takes."""
    return FORBIDDEN.sub("_", name)


def send(client: MlflowClient, run: str, batch: list[Event]) -> None:
    """Log `batch` in as few calls as MLflow's limits allow."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    metrics = [Metric(allowed(e.name), float(e.value), now, e.step) for e in batch if e.kind == "metric"]
    params = [Param(allowed(e.name), str(e.value)[:LONGEST_PARAM]) for e in batch if e.kind == "param"]
    tags = [RunTag(allowed(e.name), str(e.value)) for e in batch if e.kind == "tag"]
    if metrics or tags:
        client.log_batch(run, metrics=metrics, tags=tags)
    for start in range(0, len(params), 100):
        client.log_batch(run, params=params[start : start + 100])
    for event in batch:
        if event.kind == "artifact" and Path(str(event.value)).is_file():
            client.log_artifact(run, str(event.value))


def open_store(root: Path) -> tuple[MlflowClient, str]:
    """A client and the id of the project's experiment.

    Both the database and the artifacts are named by absolute path: MLflow's own default follows the working folder,
    which in `dvc exp run --temp` is deleted afterwards. Creating them is done under a lock, because processes that
    create one database at once all fail.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    check_reachable(address)
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    with creating(root):
        client = MlflowClient(tracking_uri=address)
        known = client.get_experiment_by_name(EXPERIMENT)
        if known is not None:
            return client, str(known.experiment_id)
        local = address.startswith("sqlite:")
        artifacts = (root / "mlartifacts").as_uri() if local else None
        return client, str(client.create_experiment(EXPERIMENT, artifact_location=artifacts))


def check_reachable(address: str) -> None:
    """Fail within two seconds where MLflow would retry a dead server for minutes."""
    parts = urlparse(address)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()


@contextmanager
def creating(root: Path) -> Iterator[None]:
    """Take turns with the project's other processes."""
    folder = root / ".work" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tracking").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def start_run(client: MlflowClient, experiment: str, identity: Identity) -> str:
    """A new run, the child of its group's; never through MLFLOW_RUN_ID, which would rename the parent."""
    tags = {"dvc.stage": f"{identity.stage}@{identity.instance}", "mlflow.runName": tag_name(identity)}
    group = group_name()
    if group:
        with creating(identity.root):
            tags["mlflow.parentRunId"] = parent_run(client, experiment, group)
    run = client.create_run(experiment, tags=tags)
    return str(run.info.run_id)


def tag_name(identity: Identity) -> str:
    """The name that a run goes by, as DVC spells the stage."""
    return f"{identity.stage}@{identity.instance}"


def parent_run(client: MlflowClient, experiment: str, group: str) -> str:
    """The id of the run that stands for `group`, made where there is none."""
    quoted = group.replace("'", "")
    found = client.search_runs([experiment], filter_string=f"tags.`{GROUP}` = '{quoted}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    run = client.create_run(experiment, tags={GROUP: quoted, "mlflow.runName": f"repro {quoted}"})
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


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
