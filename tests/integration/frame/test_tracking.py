from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from lora_pipeline.errors import Stopped
from lora_pipeline.tracking import track

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# MLflow's own; a warning turned into an error inside it would look like a dead store.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "LORA_PIPE_", "DVC_"))]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making one takes seconds, copying it none."""
    root = tmp_path_factory.mktemp("store")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client(root).search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def root(empty_store: Path, tmp_path: Path) -> Path:
    """A project with a database."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(empty_store, folder)
    return folder


def client(root: Path) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


def runs(root: Path) -> dict[str, Run]:
    """By name, once everything is delivered."""
    deadline = time.monotonic() + 120
    while spools(root):
        assert time.monotonic() < deadline, "a spool stays"
        time.sleep(0.05)
    store = client(root)
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    return {run.info.run_name: run for run in store.search_runs(experiments)}


def spools(root: Path) -> list[Path]:
    return list((root / ".work" / "tracking").iterdir())


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_holds_what_the_stage_told(root: Path) -> None:
    with track("train", "zorp", root) as tracker:
        tracker.params({"train.rank": 8, "prompt": "x" * 10_000, "odd [name]": 1})
        for step in range(300):
            tracker.metric("loss", 1 / (1 + step), step)
        picture = root / "samples.txt"
        picture.write_text("picture")
        tracker.artifact(picture)
        tracker.tag("out.zorp.safetensors", "abc")
    run = runs(root)["train@zorp"]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.rank"] == "8"
    assert len(run.data.params["prompt"]) == 6000
    assert "odd _name_" in run.data.params
    assert run.data.tags["dvc.stage"] == "train@zorp"
    history = client(root).get_metric_history(run.info.run_id, "loss")
    assert {point.step: point.value for point in history} == {step: 1 / (1 + step) for step in range(300)}
    kept = list((root / "mlartifacts").rglob("samples.txt"))
    assert [path.read_text() for path in kept] == ["picture"]


@pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError(), "FAILED"), (Stopped(signal.SIGTERM), "KILLED")])
def test_a_run_ends_as_its_stage_did(root: Path, error: Exception, status: str) -> None:
    with pytest.raises(type(error)), track("train", "zorp", root):
        raise error
    assert runs(root)["train@zorp"].info.status == status


def test_stages_of_one_repro_share_a_parent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "able-newt")
    for stage in ("train", "extract"):
        with track(stage, "zorp", root):
            pass
    found = runs(root)
    parents = {found[f"{stage}@zorp"].data.tags["mlflow.parentRunId"] for stage in ("train", "extract")}
    assert len(parents) == 1
    assert len(found) == 3


def test_first_runs_at_once_all_succeed(tmp_path: Path) -> None:
    """Processes that create one SQLite store at the same time all fail, unless they take turns."""
    script = """
import sys
from pathlib import Path
from lora_pipeline import tracking
with tracking.track("render", sys.argv[2], Path(sys.argv[1])) as tracker:
    tracker.metric("seconds", 1.0, 0)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path, name], stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    assert [(process.communicate()[1], process.returncode) for process in started] == [("", 0)] * 2
    assert set(runs(tmp_path)) == {"render@a", "render@b"}


def test_a_killed_stage_is_told_as_killed(root: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from lora_pipeline.tracking import track
with track("train", "zorp", Path(sys.argv[1])) as tracker:
    tracker.metric("loss", 0.25, 7)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script, root], check=False).returncode == -signal.SIGKILL
    run = runs(root)["train@zorp"]
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"loss": 0.25}


def test_a_refusing_server_is_told_and_what_it_missed_is_delivered_later(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        with caplog.at_level(logging.WARNING, "lora_pipeline"), track("train", "zorp", root) as tracker:
            for step in range(1000):
                tracker.metric("loss", 0.5, step)
            (spool,) = spools(root)
            until((spool / "error").is_file)
            time.sleep(0.5)
    assert len([record for record in caplog.records if record.name.startswith("lora_pipeline")]) == 1
    (spool,) = spools(root)
    events = [json.loads(line) for line in (spool / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "metric"] == list(range(1000))

    identity = json.loads((spool / "run.json").read_text())
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (spool / "run.json").write_text(json.dumps(identity | {"address": f"sqlite:///{root / 'mlflow.db'}"}))
    with track("extract", "zorp", root):
        pass
    found = runs(root)
    assert found["train@zorp"].info.status == "FINISHED"
    assert len(client(root).get_metric_history(found["train@zorp"].info.run_id, "loss")) == 1000


def test_a_silent_server_keeps_nobody_waiting(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        with track("train", "zorp", root) as tracker:
            tracker.metric("loss", 0.5, 0)
        (spool,) = spools(root)  # the stage is over, and the server has not answered
        until((spool / "error").is_file)


def test_a_courier_goes_on_where_another_stopped(root: Path) -> None:
    with track("train", "zorp", root) as tracker:
        tracker.metric("loss", 0.5, 0)
        (spool,) = spools(root)
        until(
            lambda: (
                b'"position": 0' not in (spool / "sent.json").read_bytes() if (spool / "sent.json").is_file() else False
            )
        )
        for process in psutil.process_iter(["cmdline"]):
            if str(spool) in (process.info["cmdline"] or []):
                process.kill()
                process.wait()
        tracker.metric("loss", 0.25, 1)
    with track("extract", "zorp", root):
        pass
    found = runs(root)
    assert len(found) == 2
    history = client(root).get_metric_history(found["train@zorp"].info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 0.25)]


def test_off_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PIPE_TRACKING", "off")
    with track("train", "zorp", tmp_path) as tracker:
        tracker.metric("loss", 1.0, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_store_is_where_the_project_is_not_where_the_command_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with track("train", "zorp", root) as tracker:
        (elsewhere / "note.txt").write_text("note")
        tracker.artifact(Path("note.txt"))
    assert runs(root)
    assert [path.name for path in elsewhere.iterdir()] == ["note.txt"]
    assert len(list((root / "mlartifacts").rglob("note.txt"))) == 1


def test_a_stage_never_loads_mlflow_in_its_own_thread() -> None:
    script = "import lora_pipeline.tracking, sys; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
