"""A judge trained in small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_pipeline.toyworld.fitting import Recipe
from lora_pipeline.toyworld.judge import load_judge
from lora_pipeline.toyworld.judge_pool import Counts, Reconstruct
from lora_pipeline.toyworld.judge_training import train_judge

TINY = Counts(world=40, composites=20, stickers=10, flats=10)


def darker(pixels: np.ndarray) -> np.ndarray:
    return pixels // 2


@pytest.mark.parametrize("vae", [None, darker])
def test_training_lowers_the_loss_and_writes_a_judge_with_its_card(tmp_path: Path, vae: Reconstruct | None) -> None:
    losses: list[float] = []
    recipe = Recipe(steps=30, batch=16, peak=2e-3)
    out = tmp_path / "judge"
    report = train_judge(tmp_path / "work", out, vae, lambda _, loss: losses.append(loss), recipe, TINY, fresh=30)
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    assert load_judge(out)
    card = (out / "JUDGE_CARD.md").read_text()
    assert f"| background | {100 * report['world, drawn']['background']:.1f} |" in card
    assert ("world, rebuilt" in card) == (vae is not None)
