"""Training a judge in small: it learns, resumes, and writes what it measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_pipeline.toyworld.judge import HEADS, PARTS, Answers, to_tensor
from lora_pipeline.toyworld.judge_pool import Counts, gather, own, streamed
from lora_pipeline.toyworld.judge_training import degraded, loss_of, mirrored
from lora_pipeline.toyworld.labels import label

CLASSES = {name: len(classes) for name, classes in (HEADS | PARTS).items()}
TINY = Counts(world=40, composites=20, stickers=10, flats=10)


def darker(pixels: np.ndarray) -> np.ndarray:
    return pixels // 2


def told(truth: dict[str, np.ndarray], shift: int) -> Answers:
    """Answers that are sure of the class `shift` after the right one."""
    heads = {}
    for name, classes in truth.items():
        logits = torch.zeros(len(classes), CLASSES[name])
        logits[torch.arange(len(classes)), (torch.from_numpy(classes) + shift) % CLASSES[name]] = 9.0
        heads[name] = logits
    return Answers(heads, torch.zeros(len(classes), 16, 16), {})


def test_right_answers_cost_less_than_wrong_ones() -> None:
    labels = label(streamed("world", 12, 0)[0])
    right, wrong = loss_of(told(labels.heads, 0), labels), loss_of(told(labels.heads, 1), labels)
    assert float(wrong - right) == pytest.approx(9.0 * len(CLASSES), rel=1e-3)


def test_mirroring_moves_the_picture_and_its_places() -> None:
    scenes, pixels = streamed("world", 1, 0)
    images, labels = mirrored(to_tensor(pixels), label(scenes))
    assert torch.equal(images, to_tensor(pixels[:, :, ::-1]))
    assert labels.places[0, 0, 0] == pytest.approx(64 - scenes[0].things[0].x)


def test_degraded_pictures_stay_near_and_are_counted() -> None:
    images = to_tensor(streamed("world", 8, 0)[1])
    once, again = (degraded(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert 2e-4 < float((once - images).square().mean()) < 0.02


def test_the_pool_holds_every_source_and_its_reconstructions(tmp_path: Path) -> None:
    pool = gather(tmp_path, darker, TINY, seed=0)
    assert len(pool.drawn) == len(pool.drawn_labels.kinds) == 80
    assert np.array_equal(pool.drawn[:40], streamed("world", 40, 0)[1])
    assert np.array_equal(pool.drawn[60:70], own("stickers", 10, 0)[1])
    assert np.array_equal(pool.rebuilt, pool.drawn[::16] // 2)
    again = gather(tmp_path, lambda _: pytest.fail("made them twice"), TINY, seed=0)
    assert np.array_equal(again.rebuilt, pool.rebuilt)
