"""The losses of a run, written and drawn."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from lora_pipeline.training.curve import draw_losses, write_losses
from lora_pipeline.training.loop import StepLoss

LOSSES = [StepLoss(step, "inversion" if step < 21 else "tuning", 1.0 if step < 21 else 0.1) for step in range(1, 101)]


def test_the_table_holds_every_step(tmp_path: Path) -> None:
    write_losses(LOSSES, tmp_path / "loss.csv")
    rows = list(csv.DictReader((tmp_path / "loss.csv").read_text().splitlines()))
    assert len(rows) == 100
    assert rows[20] == {"step": "21", "phase": "tuning", "loss": "0.1"}


def test_the_curve_falls_where_the_loss_does(tmp_path: Path) -> None:
    draw_losses(LOSSES, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png")).astype(int)
    inside = pixels[41:319, 41:599]
    blue = np.argwhere(np.all(inside == (0x1F, 0x77, 0xB4), axis=-1))
    red = np.argwhere(np.all(inside == (0xD6, 0x27, 0x28), axis=-1))
    assert blue[:, 0].max() < 5
    assert red[:, 0].min() > 240
    assert blue[:, 1].max() < red[:, 1].min()
    draw_losses(LOSSES, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "loss.png").read_bytes()
