"""Kills a small run at every file operation it makes, and starts it again: `python toy_run.py FOLDER`.

Run on its own because it forks, which a process with threads should not.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from train_values import train_params

from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.loop import LossAt, Stretch, train
from lora_pipeline.training.optimisation import guard_norms
from lora_pipeline.training.phases import INVERSION, TUNING, Phase

WRITES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.replace", "shutil.rmtree"}


def run(work: Path, out: Path) -> None:
    rows, matrix = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.zeros(4, 4))

    def enter(phase: str) -> LossAt:
        def loss_at(step: int) -> Tensor:
            noise = torch.randn(8, 4, generator=generator_for(1, phase, step, "noise"))
            return (noise @ matrix + rows.sum(dim=0) - noise.roll(1, dims=1)).square().mean()

        return loss_at

    first, second = (
        Phase(INVERSION, 4, 0.1, True, 0.0, 0.0, (0.0, 1.0)),
        Phase(TUNING, 5, 0.1, False, 0.0, 0.0, (0.0, 1.0)),
    )
    stretches = [
        Stretch(first, {"rows": rows}, lambda: enter(INVERSION), lambda: guard_norms(rows, 1.5)),
        Stretch(second, {"matrix": matrix}, lambda: enter(TUNING), lambda: None),
    ]
    losses = train(stretches, work, train_params({"checkpoint_every": 2}), lambda _, __: None)
    contents = rows.detach().numpy().tobytes() + matrix.detach().numpy().tobytes() + repr(losses).encode()
    out.write_text(hashlib.sha256(contents).hexdigest())


def forked(work: Path, out: Path, kill_at: int) -> bool:
    """Whether the run was killed; `kill_at` counts its file operations from 1."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: object) -> None:
            nonlocal seen
            if event in WRITES and str(work) in str(arguments):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run(work, out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    (folder / "undisturbed").mkdir()
    run(folder / "undisturbed", folder / "truth")
    kills = 0
    for kill_at in range(1, 1000):
        work, out = folder / f"work{kill_at}", folder / f"out{kill_at}"
        work.mkdir()
        if not forked(work, out, kill_at):
            break
        kills += 1
        forked(work, out, 9)  # killed a second time, wherever that is
        forked(work, out, 0)
        assert out.read_text() == (folder / "truth").read_text(), kill_at
    sys.stdout.write(f"{kills}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
