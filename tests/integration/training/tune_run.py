"""Kills a real run after some of its steps and starts it again: `python tune_run.py FOLDER`; forks, so runs alone."""

from __future__ import annotations

import os
import signal
import sys
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


TEXT = {"adapter.text_encoder_targets": ["*q_proj"], "captions.dropout": 0.3}
# Everything that draws, and everything that stands between a draw and the loss.
RANDOM = {
    "inversion.timesteps": [0.2, 1.0], "tuning.timesteps": [0.0, 0.8], "prior.target": "prediction",
    "objective.loss": "huber", "objective.weighting": "min_snr", "objective.timesteps": "logit_normal",
    "objective.offset_noise": 0.1, "objective.pyramid_noise": 0.3, "objective.input_perturbation": 0.1,
    "objective.zero_terminal_snr": True, "objective.mask_background": 0.1,
}  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, changes in (("plain", TEXT), ("random", TEXT | RANDOM)):
        (folder / name).mkdir()
        killed(folder / name, tiny.with_masks(tiny.task(folder / name, changes)))


def killed(folder: Path, task: Task) -> None:
    truth = forked(folder, task, "undisturbed", 0)
    for kills in ((1,), (2, 3), (3, 4), (5, 6, 7)):
        name = f"killed-{kills[0]}"
        for kill_at in kills:
            forked(folder, task, name, kill_at)
        assert forked(folder, task, name, 0) == truth, kills


if __name__ == "__main__":
    main(Path(sys.argv[1]))
