"""The losses of five steps of each method on the tiny base: `python golden_runs.py` writes them anew.

They change only with what is learnt: a changed formula, draw or default. Written on one machine, they are compared on
another to `TOLERANCE`, see `test_golden_losses.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch

from lora_pipeline.training.tuning import tune

LOSSES = Path(__file__).parents[2] / "golden" / "losses.json"
# Of themselves: weights that differ by a rounding move these losses by 2e-7, a rate 1 % higher by 1e-5 or more.
TOLERANCE = 5e-6

STEPS = {"inversion.steps": 5, "tuning.steps": 5}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "ti": {"method": "ti"},
    "lora": {"method": "lora", "prior.weight": 0.0},
    "dreambooth": {"method": "dreambooth", "captions.dropout": 0.2},
    "joint": {"method": "joint", "tuning.token_learning_rate": 0.01, "tuning.token_share": 0.4},
    "full": {"method": "full", "tuning.learning_rate": 0.001},
    "pti": {"method": "pti", "adapter.text_encoder_targets": ["*q_proj"]},
}


def losses(run: str) -> list[float]:
    """Of every step of a run, on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        task = tiny.task(Path(folder), {**STEPS, **RUNS[run]})
        tuned = tune(tiny.components(Path(folder) / "tokenizer"), task, work, lambda _, __: None)
    return [each.loss for each in tuned.losses]


if __name__ == "__main__":
    LOSSES.write_text(json.dumps({run: losses(run) for run in RUNS}, indent=1) + "\n", encoding="utf-8")
