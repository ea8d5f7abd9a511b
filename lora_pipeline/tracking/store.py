"""The MLflow store: one parent run a `dvc repro` and one child a stage that ran."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from lora_pipeline.tracking.spool import Event, Identity

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "lora-pipeline"
GROUP = "lora.group"
CONNECT_SECONDS = 2.0
MOST_METRICS, MOST_PARAMS = 500, 100  # a call, by MLflow's limits
LONGEST_PARAM = 6000
FORBIDDEN = re.compile(r"[^\w./ -]")  # in a name, MLflow says


def allowed(name: str) -> str:
    """The name, in the characters that MLflow takes."""
    return FORBIDDEN.sub("_", name)


def send(client: MlflowClient, run: str, events: Sequence[Event], files: Path) -> None:
    """Log `events` in as few calls as MLflow's limits allow; artifacts lie in `files`."""
    from mlflow.entities import Metric, Param, RunTag

    metrics = [Metric(allowed(e.name), float(e.value), e.time, e.step) for e in events if e.kind == "metric"]
    params = [Param(allowed(e.name), str(e.value)[:LONGEST_PARAM]) for e in events if e.kind == "param"]
    tags = [RunTag(allowed(e.name), str(e.value)) for e in events if e.kind == "tag"]
    for start in range(0, len(metrics), MOST_METRICS):
        client.log_batch(run, metrics=metrics[start : start + MOST_METRICS])
    for start in range(0, len(params), MOST_PARAMS):
        client.log_batch(run, params=params[start : start + MOST_PARAMS])
    if tags:
        client.log_batch(run, tags=tags)
    for event in events:
        if event.kind == "artifact":
            client.log_artifact(run, str(files / event.name))


def end_run(client: MlflowClient, run: str, event: Event) -> None:
    """Close the run as `event` says."""
    client.set_terminated(run, status=str(event.value), end_time=event.time)


def open_store(root: Path, address: str) -> tuple[MlflowClient, str]:
    """A client and the id of the project's experiment.

    Both the database and the artifacts are named by absolute path: MLflow's own default follows the working folder,
    which in `dvc exp run --temp` is deleted afterwards. Creating them is done under a lock, because processes that
    create one database at once all fail.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
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
    name = f"{identity.stage}@{identity.instance}"  # as DVC spells the stage
    tags = {"dvc.stage": name, "mlflow.runName": name}
    if identity.group:
        with creating(Path(identity.root)):
            tags["mlflow.parentRunId"] = parent_run(client, experiment, identity.group)
    run = client.create_run(experiment, tags=tags)
    return str(run.info.run_id)


def parent_run(client: MlflowClient, experiment: str, group: str) -> str:
    """The id of the run that stands for `group`, made where there is none."""
    quoted = group.replace("'", "")
    found = client.search_runs([experiment], filter_string=f"tags.`{GROUP}` = '{quoted}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    run = client.create_run(experiment, tags={GROUP: quoted, "mlflow.runName": f"repro {quoted}"})
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)
