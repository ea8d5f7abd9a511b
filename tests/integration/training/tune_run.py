"""Kills real runs after some steps and starts them again: `python tune_run.py FOLDER`; forks, so runs alone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch

from lora_pipeline.adapters import save_adapter
from lora_pipeline.adapters.adapter import Json
from lora_pipeline.training.tuning import Task, tune

TRUTH = "undisturbed"
TEXT = {"adapter.text_encoder_targets": ["*q_proj"], "captions.dropout": 0.3}
# Everything that draws, and everything that stands between a draw and the loss.
RANDOM = {
    "inversion.timesteps": [0.2, 1.0], "tuning.timesteps": [0.0, 0.8], "prior.target": "prediction",
    "objective.loss": "huber", "objective.weighting": "min_snr", "objective.timesteps": "logit_normal",
    "objective.offset_noise": 0.1, "objective.pyramid_noise": 0.3, "objective.input_perturbation": 0.1,
    "objective.zero_terminal_snr": True, "objective.mask_background": 0.1,
}  # fmt: skip
# Everything random about pictures and captions, and looks at those that are set aside.
SHOWN = {
    "pictures.flip": True, "pictures.repeats": {"000*": 2}, "captions.shuffle": True, "captions.keep_tags": 0,
    "captions.dropout": 0.3, "validation.every": 2, "method": "lora", "tuning.steps": 5,
}  # fmt: skip
RICH = {"optimiser.name": "prodigy", "optimiser.ema": 0.6, "optimiser.accumulation": 2}
# Whatever else adapters are made of, and what they leave out on the way.
KINDS_OF_ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"adapter.kind": "dora", "adapter.dropout": 0.2, "adapter.module_dropout": 0.2, "adapter.max_norm": 0.1},
    "lokr": {"adapter.kind": "lokr", "adapter.rank_dropout": 0.5, "optimiser.ema": 0.6},
    "pissa": {"adapter.init": "pissa"},
}
JOINT = {"method": "joint", "tuning.token_learning_rate": 0.01, "tuning.token_share": 0.4}
FULL = {"method": "full", "tuning.steps": 4}
KINDS = {"xl-inpaint": TEXT | {"tuning.token_learning_rate": 0.01}}


def forked(folder: Path, task: Task, name: str, kill_at: int) -> bytes | None:
    """The bytes of what was learnt, or None if it was killed after `kill_at` steps."""
    child = os.fork()
    if child == 0:

        def report(step: int, values: dict[str, float]) -> None:
            del values
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        (folder / name).mkdir(exist_ok=True)
        cache = None if name == TRUTH else folder
        kind = folder.name if folder.name in KINDS else "sd1"
        tuned = tune(tiny.components(folder / "tokenizer", kind=kind), task, folder / name, report, cache=cache)
        losses = [each.loss for each in (*tuned.losses, *tuned.validation)]
        sums = {name: float(weight.double().sum()) for name, weight in tuned.weights.items()}
        provenance: dict[str, Json] = {"losses": [*losses], "sums": {**sums}}
        save_adapter(tuned.adapter(provenance), folder / f"{name}.safetensors")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if kill_at else 0)
    return None if kill_at else (folder / f"{name}.safetensors").read_bytes()


def survives(folder: Path, task: Task, series: Sequence[Sequence[int]]) -> None:
    """Whatever kills it on the way, and though it finds encodings on the disk."""
    truth = forked(folder, task, TRUTH, 0)
    for kills in series:
        name = "killed-" + "-".join(map(str, kills))
        for kill_at in kills:
            forked(folder, task, name, kill_at)
        assert forked(folder, task, name, 0) == truth, kills


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    names = ("plain", "rich", "random", "shown", "joint", "full", *KINDS, *KINDS_OF_ADAPTERS)
    places = {name: folder / name for name in names}
    for place in places.values():
        place.mkdir()
    survives(places["plain"], tiny.task(places["plain"], TEXT), ((1,), (2, 3), (3, 4), (5, 6, 7)))
    rich = tiny.task(places["rich"], TEXT | RICH)
    survives(places["rich"], rich, ((1,), (3, 4), (5, 6, 7)))
    rich.params.tuning.steps = 7
    assert forked(places["rich"], rich, TRUTH, 0) == forked(places["rich"], rich, "straight", 0)
    survives(places["random"], tiny.with_masks(tiny.task(places["random"], TEXT | RANDOM)), ((1,), (3, 4)))
    survives(places["joint"], tiny.task(places["joint"], JOINT), ((1,), (2, 3)))
    survives(places["full"], tiny.task(places["full"], FULL), ((2, 3),))
    for kind, values in KINDS.items():
        survives(places[kind], tiny.task(places[kind], values), ((1,), (4, 5)))
    for name, values in KINDS_OF_ADAPTERS.items():
        survives(places[name], tiny.task(places[name], {**TEXT, "method": "lora", **values}), ((1,), (2, 3)))
    shown = tiny.task(places["shown"], SHOWN)
    for example, side in zip(shown.examples, (8, 16, 8), strict=True):
        tiny.Image.open(example.image).resize((side, 8)).save(example.image)
    tagged = [replace(example, caption=f"{example.caption}, a dog, a") for example in shown.examples]
    survives(places["shown"], replace(shown, examples=tagged), ((1,), (3, 4)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
