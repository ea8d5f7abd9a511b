"""Kills real runs after some of their steps and starts them again: `python tune_run.py FOLDER`; forks: runs alone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import tiny
import torch

from lora_pipeline.adapters import save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.training.tuning import Task, tune


def forked(folder: Path, task: Task, name: str, kill_at: int) -> bytes | None:
    """The bytes of what was learnt, or None if it was killed after `kill_at` steps."""
    child = os.fork()
    if child == 0:

        def report(step: int, values: dict[str, float]) -> None:
            del values
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        (folder / name).mkdir(exist_ok=True)
        tuned = tune(tiny.components(folder / "tokenizer"), task, folder / name, report)
        losses = [each.loss for each in tuned.losses]
        save_adapter(Adapter(tuned.factors, tuned.embeddings, {"losses": losses}), folder / f"{name}.safetensors")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if kill_at else 0)
    return None if kill_at else (folder / f"{name}.safetensors").read_bytes()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    task = tiny.task(folder, {"adapter.text_encoder_targets": ["*q_proj"], "captions.dropout": 0.3})
    params = task.params
    killed(folder, task, "plain", ((1,), (2, 3), (3, 4), (5, 6, 7)))
    params.optimiser.name, params.optimiser.ema, params.optimiser.accumulation = "prodigy", 0.6, 2
    killed(folder, task, "rich", ((1,), (3, 4), (5, 6, 7)))
    params.tuning.steps = 7
    grown = forked(folder, task, "rich-undisturbed", 0)
    assert grown == forked(folder, task, "straight", 0)


def killed(folder: Path, task: Task, label: str, series: Sequence[Sequence[int]]) -> None:
    truth = forked(folder, task, f"{label}-undisturbed", 0)
    for kills in series:
        name = f"{label}-{kills[0]}"
        for kill_at in kills:
            forked(folder, task, name, kill_at)
        assert forked(folder, task, name, 0) == truth, kills


if __name__ == "__main__":
    main(Path(sys.argv[1]))
