"""Two processes that train one run together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lora_pipeline.adapters import load_adapter
from lora_pipeline.errors import ParamsError
from lora_pipeline.training.processes import Crew, processes_asked
from lora_pipeline.training.tuning import tune

ROOT = Path(__file__).parents[3]
CHANGES: dict[str, Any] = {
    "optimiser.accumulation": 4, "adapter.text_encoder_targets": ["*q_proj"], "optimiser.ema": 0.5,
}  # fmt: skip


def together(folder: Path, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=folder
    )


@pytest.mark.filterwarnings("default::FutureWarning")
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    task = tiny.task(tmp_path, CHANGES)
    for name in ("alone", "work"):
        (tmp_path / name).mkdir()
    alone = tune(tiny.components(tmp_path / "tokenizer"), task, tmp_path / "alone", lambda _, __: None)
    ran = together(tmp_path, str(Path(__file__).with_name("crew_run.py")), str(tmp_path), json.dumps(CHANGES))
    assert ran.returncode == 0, ran.stderr
    adapter = load_adapter(tmp_path / "together.safetensors")
    losses: Any = adapter.provenance["losses"]
    assert losses == pytest.approx([each.loss for each in alone.losses], rel=1e-5)
    for target, factors in alone.factors.items():
        torch.testing.assert_close(adapter.factors[target].delta(), factors.delta(), rtol=1e-3, atol=1e-5)
    assert (tmp_path / "rank1" / "done").exists()
    assert not (tmp_path / "rank1" / "LATEST").exists()


def test_batches_are_dealt_out_evenly_or_not_at_all() -> None:
    shares = [Crew(rank, 3).share(6) for rank in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(6))
    with pytest.raises(ParamsError, match="3 processes") as caught:
        Crew(0, 3).share(4)
    assert caught.value.where == "optimiser.accumulation"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("accelerate launch --cpu --num_processes 2 lora-pipe train", 2),
        ("accelerate launch --num-processes=3 lora-pipe", 3),
        ("accelerate launch lora-pipe train", 1),
        ("accelerate launch --num_processes", 1),
    ],
)
def test_how_many_processes_a_launcher_was_asked_for(line: str, count: int) -> None:
    assert processes_asked(line.split()) == count


def test_a_launcher_that_started_one_process_instead_of_two_is_found_out(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom lora_pipeline.errors import UsageError\n"
        "from lora_pipeline.training.processes import together\n"
        "try:\n    with together():\n        pass\nexcept UsageError:\n    sys.exit(9)\n"
    )
    pytest.importorskip("accelerate")
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [*command, str(program)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "exit status 9" in ran.stderr, ran.stderr
