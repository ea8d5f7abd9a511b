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


def test_looks_at_pictures_set_aside_are_a_column_and_a_black_line(tmp_path: Path) -> None:
    looks = [StepLoss(step, "tuning", 0.5) for step in (50, 100)]
    write_losses(LOSSES, tmp_path / "loss.csv", looks)
    rows = list(csv.DictReader((tmp_path / "loss.csv").read_text().splitlines()))
    assert {row["step"]: row["validation_loss"] for row in rows if row["validation_loss"]} == {
        "50": "0.5",
        "100": "0.5",
    }
    draw_losses(LOSSES, tmp_path / "loss.png", looks)
    inside = np.asarray(Image.open(tmp_path / "loss.png"))[41:319, 41:599]
    black = np.argwhere(np.all(inside == 0, axis=-1))
    assert set(np.unique(black[:, 0])) <= set(range(134, 146))
    assert black[:, 1].min() < 290
    assert black[:, 1].max() > 550
