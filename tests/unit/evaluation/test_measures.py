"""Measures against values computed by hand, and intervals that cover."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_pipeline.evaluation.measures import centroid, diversity, drift, estimate, likeness
from lora_pipeline.evaluation.report import draw_chart, metrics, write_metrics, write_rows
from lora_pipeline.evaluation.scores import References, Rendered, Scores, score

EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def test_centroid_is_the_unit_mean() -> None:
    assert torch.allclose(centroid(torch.stack([EAST, NORTH])), torch.tensor([0.5**0.5, 0.5**0.5]))


def test_likeness_is_the_cosine_with_the_centroid() -> None:
    assert likeness(torch.stack([EAST, NORTH]), EAST[None]).tolist() == [1.0, 0.0]


def test_drift_is_the_squared_distance_of_the_means() -> None:
    assert drift(EAST[None], NORTH[None]) == pytest.approx(2.0)
    assert drift(EAST[None], EAST[None]) == pytest.approx(0.0)


def test_drift_of_samples_of_one_distribution_is_zero_on_average_at_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    told = []
    for _ in range(400):
        both = torch.nn.functional.normalize(torch.randn(10, 3, generator=generator) + 0.5, dim=1)
        told.append(drift(both[:4], both[4:]))
    assert abs(float(np.mean(told))) < 0.05


def test_diversity_is_the_mean_over_different_pairs() -> None:
    # Pairs: (E, E) 0, (E, N) 1, (E, N) 1.
    assert diversity(torch.stack([EAST, EAST, NORTH])) == pytest.approx(2 / 3)
    assert diversity(EAST[None]) == 0.0


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        told = estimate(rng.normal(0.3, 1.0, 60), np.random.default_rng(trial))
        covered += told.low <= 0.3 <= told.high
    assert 0.88 <= covered / 200 <= 0.99


class Colours:
    """A scorer that sees the mean colour: the first two channels as identity, the last two as style."""

    def identity(self, images: np.ndarray) -> torch.Tensor:
        return self._unit(images, slice(0, 2))

    def style(self, images: np.ndarray) -> torch.Tensor:
        return self._unit(images, slice(1, 3))

    def prompt_accuracy(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        assert len(images) == len(prompts)
        return np.array([float(prompt == "red") for prompt in prompts])

    def _unit(self, images: np.ndarray, channels: slice) -> torch.Tensor:
        means = torch.from_numpy(images.astype(np.float32).mean((1, 2))[:, channels]) + 1e-6
        return torch.nn.functional.normalize(means, dim=-1)


def plain(*colours: tuple[int, int, int]) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), colour, np.uint8) for colour in colours])


RED, GREEN = (255, 0, 0), (0, 255, 0)


def scored() -> Scores:
    prompted = Rendered(plain(RED, GREEN), ("red", "green"), (1, 2), ("0.png", "1.png"))
    classed = Rendered(plain(GREEN), ("green",), (1,), ("2.png",))
    return score(prompted, classed, References(plain(RED), None, plain(RED)), Colours(), seed=0)


def test_scores_of_a_set() -> None:
    told = metrics(scored())
    assert told["subject"] == pytest.approx(0.5, abs=1e-5)
    assert told["prompt_accuracy"] == 0.5
    assert told["leak"] == pytest.approx(0.0, abs=1e-5)
    assert told["drift"] == pytest.approx(2.0, abs=1e-3)
    assert "style" not in told
    assert told["subject_n"] == 2


def test_reports_have_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scores = scored()
        write_metrics(scores, tmp_path / f"{name}.json")
        write_rows(scores, tmp_path / f"{name}.csv")
        draw_chart(scores, "set", tmp_path / f"{name}.png")
    for suffix in ("json", "csv", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert list(json.loads((tmp_path / "a.json").read_text())) == sorted(json.loads((tmp_path / "a.json").read_text()))
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "file,role,prompt,seed,subject,style,prompt_accuracy"
