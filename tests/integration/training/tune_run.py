"""Kills a real run after some of its steps and starts it again: `python tune_run.py FOLDER`; forks, so runs alone."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch

from lora_pipeline.adapters import save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.training.tuning import Task, tune

TRUTH = "undisturbed"
# Everything random about pictures and captions, and looks at those that are set aside.
SHOWN = {
    "pictures.flip": True, "pictures.repeats": {"000*": 2}, "captions.shuffle": True, "captions.keep_tags": 0,
    "captions.dropout": 0.3, "validation.every": 2, "method": "lora",
}  # fmt: skip


def forked(folder: Path, task: Task, name: str, kill_at: int) -> bytes | None:
    """The bytes of what was learnt, or None if it was killed after `kill_at` steps."""
    child = os.fork()
    if child == 0:

        def report(step: int, values: dict[str, float]) -> None:
            del values
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        (folder / name).mkdir(exist_ok=True)
        tuned = tune(
            tiny.components(folder / "tokenizer"), task, folder / name, report, cache=None if name == TRUTH else folder
        )
        losses = [each.loss for each in (*tuned.losses, *tuned.validation)]
        save_adapter(Adapter(tuned.factors, tuned.embeddings, {"losses": losses}), folder / f"{name}.safetensors")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if kill_at else 0)
    return None if kill_at else (folder / f"{name}.safetensors").read_bytes()


def survives(folder: Path, task: Task, ends: int) -> None:
    """Whatever kills it on the way, and though it finds encodings on the disk."""
    truth = forked(folder, task, TRUTH, 0)
    for kills in ((1,), (2, 3), (3, 4), (ends - 2, ends - 1, ends)):
        name = "killed-" + "-".join(map(str, kills))
        for kill_at in kills:
            forked(folder, task, name, kill_at)
        assert forked(folder, task, name, 0) == truth, kills


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in ("plain", "shown"):
        (folder / name).mkdir()
    plain = tiny.task(folder / "plain", {"adapter.text_encoder_targets": ["*q_proj"], "captions.dropout": 0.3})
    survives(folder / "plain", plain, ends=7)
    shown = tiny.task(folder / "shown", {**SHOWN, "tuning.steps": 5})
    for example, side in zip(shown.examples, (8, 16, 8), strict=True):
        tiny.Image.open(example.image).resize((side, 8)).save(example.image)
    tagged = [replace(example, caption=f"{example.caption}, a dog, a") for example in shown.examples]
    survives(folder / "shown", replace(shown, examples=tagged), ends=5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
