"""One of several processes that train together: `torchrun crew_run.py FOLDER CHANGES`; the first writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch
from train_values import train_params

from lora_pipeline.adapters import save_adapter
from lora_pipeline.data.dataset import read_examples
from lora_pipeline.training.processes import rank
from lora_pipeline.training.tuning import Task, tune


def main(folder: Path, changes: str) -> None:
    torch.set_num_threads(1)
    pictures = read_examples(folder / "own"), read_examples(folder / "class")
    task = Task("zorp", "<zorp>", *pictures, train_params(json.loads(changes)), seed=7)
    own = folder / f"rank{rank()}"
    own.mkdir()
    tuned = tune(tiny.components(own / "tokenizer"), task, folder / "work" if rank() == 0 else own, lambda _, __: None)
    if rank() == 0:
        losses = [each.loss for each in tuned.losses]
        save_adapter(tuned.adapter({"losses": losses}), folder / "together.safetensors")
    (own / "done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
