"""The frame of a stage under a real `dvc`: a toy pipeline whose only stage counts to a number of steps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
COMMAND = """
import sys, time
from pathlib import Path
from lora_pipeline.yaml_file import read_yaml
from stages._stage import PARAMS, stage

def settings():
    return read_yaml(PARAMS)["count"]

with stage("count", "a", out=Path("made"), inputs=[Path("raw.txt")], section=settings) as run:
    checkpoint = run.work / "checkpoint"
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with open("starts.log", "a") as log:
        log.write(f"{start}\\n")
    for step in range(start, settings()["steps"]):
        time.sleep(settings()["seconds"])
        checkpoint.with_suffix(".new").write_text(str(step + 1))
        checkpoint.with_suffix(".new").rename(checkpoint)
    run.building.mkdir()
    (run.building / "steps").write_text(str(settings()["steps"]))
"""
PIPELINE = """
stages:
  count:
    cmd: exec {python} count.py
    deps: [raw.txt, stages/count.py]
    params: [count]
    outs: [made]
"""


class Project:
    """A DVC project in `folder`."""

    def __init__(self, folder: Path, shell: str) -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))
        }
        self.environment |= {
            "PYTHONPATH": str(ROOT),
            "LORA_PIPE_TRACKING": "off",
            "SHELL": shell,
            "DVC_NO_ANALYTICS": "1",
        }
        self.write("count.py", COMMAND)
        self.write("dvc.yaml", PIPELINE.format(python=sys.executable))
        self.write("stages/count.py", "VERSION = 1")
        self.write("raw.txt", "raw")
        self.write(".dvcignore", ".work/\n")
        self.dvc("init", "--no-scm", "--quiet").wait()

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)

    def steps(self, steps: int, seconds: float) -> None:
        self.write("params.yaml", f"count: {{steps: {steps}, seconds: {seconds}}}")

    def dvc(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "dvc.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dvc", *arguments], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def repro(self) -> int:
        return self.dvc("repro").wait()

    def until_checkpoint(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while not any(int(path.read_text()) >= step for path in self.folder.glob(".work/count/a/*/checkpoint")):
            assert time.monotonic() < deadline, (self.folder / "dvc.log").read_text()
            time.sleep(0.02)

    def kill_at(self, step: int) -> list[psutil.Process]:
        """Kill `dvc` alone, with SIGKILL; returns what it had started."""
        process = self.dvc("repro")
        self.until_checkpoint(step)
        children: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        return children

    def starts(self) -> list[int]:
        """The steps that runs of the stage began at."""
        return [int(line) for line in (self.folder / "starts.log").read_text().split()]


@pytest.fixture(params=["/bin/sh", "/bin/bash"])
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Project:
    if not Path(request.param).exists():
        pytest.skip(f"there is no {request.param}")
    return Project(tmp_path, request.param)


def test_it_runs_once_and_comes_back_without_running(project: Project) -> None:
    for steps in (3, 3, 4, 3):
        project.steps(steps, 0.0)
        assert project.repro() == 0
    assert project.starts() == [0, 0]
    assert (project.folder / "made" / "steps").read_text() == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_dvc_leaves_no_writer_and_the_next_one_goes_on(project: Project) -> None:
    project.steps(60, 0.1)
    started = project.kill_at(5)
    assert started
    _, alive = psutil.wait_procs(started, timeout=3)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not (project.folder / "made").exists()
    assert project.repro() == 0
    assert project.starts()[0] == 0
    assert 5 <= project.starts()[1] < 60
    assert (project.folder / "made" / "steps").read_text() == "60"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_checkpoint_of_other_code_is_not_gone_on_from(project: Project) -> None:
    project.steps(20, 0.1)
    project.kill_at(5)
    project.write("stages/count.py", "VERSION = 2")
    time.sleep(0.5)
    assert project.repro() == 0
    assert project.starts() == [0, 0]


@pytest.mark.parametrize("file", ["raw.txt", "stages/count.py", "params.yaml"])
def test_an_edit_during_a_run_is_not_recorded(project: Project, file: str) -> None:
    project.steps(20, 0.1)
    process = project.dvc("repro")
    project.until_checkpoint(2)
    project.write(file, "count: {steps: 21, seconds: 0.1}" if file == "params.yaml" else "edited")
    assert process.wait() != 0
    assert "changed while it ran" in (project.folder / "dvc.log").read_text()
    assert not (project.folder / "made").exists()
    assert not (project.folder / "dvc.lock").exists()
