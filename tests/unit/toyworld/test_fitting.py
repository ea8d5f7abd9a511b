"""The training loop against problems with known answers, and against itself stopped half-way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_pipeline.toyworld.fitting import Average, Recipe, fit, learning_rate, load_weights, plain, step_generator


def quiet(step: int, loss: float) -> None:
    """No report."""


def line() -> nn.Linear:
    model = nn.Linear(3, 2)
    load_weights(model, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    return model


TRUTH = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.5, -1.0]])


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(16, 3, generator=step_generator(1, step))
    return F.mse_loss(model(inputs), inputs @ TRUTH.T + 3)


def test_fit_finds_the_solution_of_a_linear_problem(tmp_path: Path) -> None:
    model, losses = line(), []
    recipe = Recipe(steps=500, batch=16, peak=6e-2, weight_decay=0.0)
    average = fit(
        model, plain(lambda s: loss_of(model, s)), recipe, tmp_path / "c", lambda _, loss: losses.append(loss)
    )
    assert len(losses) == 500
    assert torch.allclose(average.weights["weight"], TRUTH, atol=0.02)
    assert torch.allclose(average.weights["bias"], torch.full((2,), 3.0), atol=0.02)


class PowerCutError(Exception):
    """The power goes."""


def test_a_stopped_fit_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(steps=30, batch=16, peak=1e-2)
    model = line()
    whole = fit(model, plain(lambda s: loss_of(model, s)), recipe, tmp_path / "whole", quiet)

    def cut_at_20(step: int, _: float) -> None:
        if step == 20:
            raise PowerCutError

    monkeypatch.setattr("lora_pipeline.toyworld.fitting.CHECKPOINT_SECONDS", 0.0)
    stopped = line()
    with pytest.raises(PowerCutError):
        fit(stopped, plain(lambda s: loss_of(stopped, s)), recipe, tmp_path / "cut", cut_at_20)
    seen = []
    resumed = line()
    again = fit(
        resumed, plain(lambda s: loss_of(resumed, s)), recipe, tmp_path / "cut", lambda step, _: seen.append(step)
    )
    assert seen == list(range(20, 31))
    assert whole.weights["weight"].abs().min() > 0
    for name, weight in whole.weights.items():
        assert torch.equal(again.weights[name], weight)
        assert torch.equal(dict(resumed.named_parameters())[name], dict(model.named_parameters())[name])


def test_a_finished_fit_does_nothing_more(tmp_path: Path) -> None:
    recipe = Recipe(steps=5, batch=16, peak=1e-2)
    model = line()
    done = fit(model, plain(lambda s: loss_of(model, s)), recipe, tmp_path / "c", quiet)
    other = line()
    again = fit(other, lambda _: pytest.fail("took a step"), recipe, tmp_path / "c", quiet)
    assert torch.equal(again.weights["weight"], done.weights["weight"])


def test_a_held_learning_rate_stays_at_its_peak_first() -> None:
    recipe = Recipe(steps=1000, batch=1, peak=2.0, hold=0.6)
    rates = [learning_rate(recipe, step) for step in range(1000)]
    assert set(rates[200:601]) == {2.0}
    assert rates[800] == pytest.approx(2 * (0.01 + 0.99 * 0.5))
    assert rates[-1] == pytest.approx(0.02, rel=0.01)


def test_the_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    recipe = Recipe(steps=1000, batch=1, peak=2.0)
    rates = [learning_rate(recipe, step) for step in range(1000)]
    assert rates[99] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(2.0)
    assert rates[199:] == sorted(rates[199:], reverse=True)
    assert rates[600] == pytest.approx(2 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert rates[-1] == pytest.approx(0.02, rel=0.01)


def test_the_average_follows_its_formula_and_steps_aside() -> None:
    model = line()
    average = Average(model)
    expected = torch.zeros(2)
    for step in range(4):
        load_weights(model, {"weight": torch.zeros(2, 3), "bias": torch.full((2,), step + 1.0)})
        average.update(step)
        keep = (step + 1) / (step + 10)
        expected = keep * expected + (1 - keep) * (step + 1.0)
    assert torch.allclose(average.weights["bias"], expected)
    with average.applied(model):
        assert torch.equal(model.bias, average.weights["bias"])
    assert torch.equal(model.bias, torch.full((2,), 4.0))


def test_draws_are_counted() -> None:
    def draw(*key: int) -> float:
        return float(torch.rand((), generator=step_generator(*key)))

    assert draw(0, 5) == draw(0, 5)
    assert len({draw(0, 5), draw(0, 6), draw(1, 5), draw(0, 5, 1)}) == 4
