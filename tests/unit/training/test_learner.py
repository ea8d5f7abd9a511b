"""Steps of a phase: accumulation, clipping, averages, loss scales, and losses that go wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_values import train_params

from lora_pipeline.errors import ParamsError
from lora_pipeline.keeping import FINISHED
from lora_pipeline.training.learner import Learner, Stretch
from lora_pipeline.training.loop import train
from lora_pipeline.training.phases import TUNING, Phase
from lora_pipeline.training.processes import ALONE

Undisturbed = Callable[[dict[str, Any]], list[float]]
DATA = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


def silent(step: int, values: dict[str, float]) -> None:
    del step, values


class Regression:
    """A linear model of the data's first column by the others."""

    def __init__(self, batch: int = 4) -> None:
        self.weight = nn.Parameter(torch.zeros(4))
        self.bias = nn.Parameter(torch.zeros(1))
        self.batch = batch

    def loss_at(self, step: int) -> Tensor:
        rows = DATA[[place % len(DATA) for place in range(step * self.batch, (step + 1) * self.batch)]]
        return (rows[:, 1:] @ self.weight + self.bias - rows[:, 0]).square().mean()

    def stretch(self, steps: int, rate: float = 0.1, **more: Any) -> Stretch:
        parameters = {"weight": self.weight, "bias": self.bias}
        phase = Phase(TUNING, steps, rate, False, 0.0, 0.0, [0.0, 1.0])
        return Stretch(phase, parameters, lambda: self.loss_at, lambda: None, **more)

    def values(self) -> list[float]:
        return [*self.weight.tolist(), *self.bias.tolist()]


def run(work: Path, changes: dict[str, Any], steps: int = 12, batch: int = 4, **more: Any) -> Regression:
    work.mkdir(exist_ok=True)
    problem = Regression(batch)
    train([problem.stretch(steps, **more)], work, train_params({"checkpoint_every": 5, **changes}), silent)
    return problem


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    many = run(tmp_path / "many", {"optimiser.accumulation": 4}, batch=4)
    one = run(tmp_path / "one", {}, batch=16)
    assert many.values() == pytest.approx(one.values(), rel=1e-5)
    assert many.values() != run(tmp_path / "small", {}, batch=4).values()


@pytest.mark.parametrize("norm", [None, 0.01])
def test_gradients_are_clipped_only_when_asked(norm: float | None) -> None:
    problem = Regression()
    params = train_params({"optimiser.name": "torch.optim.SGD", "optimiser.options": {}, "optimiser.clip_norm": norm})
    params.optimiser.weight_decay = 0.0
    problem.loss_at(0).backward()
    gradient = torch.cat([problem.weight.grad, problem.bias.grad])  # type: ignore[list-item]
    problem.weight.grad = problem.bias.grad = None
    told = Learner(problem.stretch(1, 1.0), params, ALONE).take_step(problem.loss_at, 0)
    assert told["gradient_norm"] == pytest.approx(float(gradient.norm()))
    length = float(gradient.norm()) if norm is None else norm
    assert torch.tensor(problem.values()).norm().item() == pytest.approx(length, rel=1e-4)


def test_the_schedule_is_asked_once_a_step(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def factor(step: int, steps: int) -> float:
        asked.append((step, steps))
        return 0.5

    run(tmp_path, {}, steps=3, factor=factor)
    assert asked == [(0, 3), (1, 3), (2, 3)]


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    raw: list[Tensor] = []
    problem = Regression()
    stretch = problem.stretch(30)
    watching = Stretch(stretch.phase, stretch.parameters, stretch.enter, lambda: raw.append(problem.weight.clone()))
    train([watching], tmp_path, train_params({"checkpoint_every": 5, "optimiser.ema": 0.6}), silent)
    expected = raw[0]
    for number, value in enumerate(raw[1:], start=2):
        decay = min(0.6, number / (9 + number))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(problem.weight.detach(), expected.detach())
    assert not torch.equal(problem.weight, raw[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What 12 steps learn that nothing stops."""

    @cache
    def learnt(changes: str) -> list[float]:
        return run(tmp_path_factory.mktemp("undisturbed"), json.loads(changes)).values()

    return lambda changes: learnt(json.dumps(changes))


CHANGES = (
    {"optimiser.name": "prodigy", "optimiser.ema": 0.9},
    {"optimiser.name": "lion", "optimiser.accumulation": 2},
    {"optimiser.name": "adafactor", "optimiser.options": {}},
    {"optimiser.name": "torch.optim.RAdam", "optimiser.options": {}, "optimiser.ema": 0.5},
    {"engine.precision": "float16"},
)


class StoppedError(Exception):
    pass


def stop_at(step: int) -> Callable[[int, dict[str, float]], None]:
    def report(done: int, values: dict[str, float]) -> None:
        del values
        if done == step:
            raise StoppedError

    return report


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("stops", [(3,), (7, 11)])
def test_stopped_and_started_again_it_learns_the_same(
    tmp_path: Path, changes: dict[str, Any], stops: Sequence[int], undisturbed: Undisturbed
) -> None:
    work = tmp_path / "stopped"
    work.mkdir()
    params = train_params({"checkpoint_every": 5, **changes})
    for stop in stops:
        with pytest.raises(StoppedError):
            train([Regression().stretch(12)], work, params, stop_at(stop))
    assert run(work, changes).values() == undisturbed(changes)


@pytest.mark.parametrize("changes", [{}, *CHANGES])
@pytest.mark.parametrize("finished", [True, False])
def test_a_longer_run_goes_on_from_a_shorter_one(
    tmp_path: Path, changes: dict[str, Any], finished: bool, undisturbed: Undisturbed
) -> None:
    work = tmp_path / "grown"
    run(work, changes, steps=8)
    if finished:
        (work / FINISHED).touch()
    taken: list[int] = []
    problem = Regression()
    params = train_params({"checkpoint_every": 5, **changes})
    losses = train([problem.stretch(12)], work, params, lambda step, _: taken.append(step))
    assert taken == [9, 10, 11, 12]
    assert len(losses) == 12
    assert problem.values() == undisturbed(changes)


def falling(step: int, steps: int) -> float:
    return 1 - step / steps


@pytest.mark.parametrize(
    ("steps", "more", "says"),
    [(12, {"factor": falling}, "8 steps are done, but not as a run of 12 does them"), (6, {}, "of 6"), (8, {}, None)],
)
def test_what_another_plan_would_have_done_otherwise_starts_over(
    tmp_path: Path, steps: int, more: dict[str, Any], says: str | None
) -> None:
    run(tmp_path / "work", {}, steps=8, **more)
    (tmp_path / "work" / FINISHED).touch()
    taken: list[int] = []
    said: list[str] = []
    problem = Regression()
    train(
        [problem.stretch(steps, **more)], tmp_path / "work", train_params({"checkpoint_every": 5}),
        lambda step, _: taken.append(step), say=said.append,
    )  # fmt: skip
    assert taken == list(range(1, steps + 1))
    assert [says in each for each in said if says] == ([True] if says else [])
    assert problem.values() == run(tmp_path / "straight", {}, steps=steps, **more).values()


@pytest.mark.parametrize("outlier", [None, 7, 60])
def test_a_loss_that_diverges_stops_and_keeps_the_last_checkpoint(tmp_path: Path, outlier: int | None) -> None:
    problem = Regression()
    growth = 1.1  # medians of 20 that are n steps apart differ by 1.1 ** n: over tenfold from n = 25 on

    def loss_at(step: int) -> Tensor:
        return problem.weight.sum() * 0 + growth ** (max(0, step - 50)) * (1e6 if step == outlier else 1.0)

    phase = problem.stretch(400).phase
    stretch = Stretch(phase, {"weight": problem.weight}, lambda: loss_at, lambda: None)
    taken: list[int] = []
    with pytest.raises(ParamsError, match=r"diverges: 1 at first, \S+ around step \d+ of the tuning") as caught:
        train([stretch], tmp_path, train_params({}), lambda step, _: taken.append(step))
    assert caught.value.where == "tuning.learning_rate"
    assert 51 + 24 <= taken[-1] <= 51 + 10 + 26
    assert (tmp_path / "LATEST").read_text().strip() == f"generation-{(taken[-1] - 1) // 2 * 2:010}"


def test_a_gradient_that_is_not_finite_names_where_it_was_first(tmp_path: Path) -> None:
    early, late = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    phase = Phase(TUNING, 3, 0.1, False, 0.0, 0.0, [0.0, 1.0])

    def loss_at(step: int) -> Tensor:
        del step
        return (early * late.sqrt()).sum()  # the root's slope at 0 is infinite, and early's is 0

    stretch = Stretch(phase, {"early": early, "late": late}, lambda: loss_at, lambda: None)
    with pytest.raises(ParamsError, match="at step 1 of the tuning, in late first"):
        train([stretch], tmp_path, train_params({}), silent)


def test_a_scaled_loss_takes_the_same_steps_and_skips_overflows() -> None:
    plain, scaled = Regression(), Regression()
    one = Learner(plain.stretch(3), train_params({}), ALONE)
    other = Learner(scaled.stretch(3), train_params({"engine.precision": "float16"}), ALONE)
    for step in range(3):
        assert one.take_step(plain.loss_at, step) == pytest.approx(other.take_step(scaled.loss_at, step))
    assert plain.values() == pytest.approx(scaled.values())
    before, scale = scaled.values(), other.scale
    assert scale is not None
    scale.value = 2.0**127  # of float32; any gradient overflows
    told = other.take_step(lambda step: scaled.loss_at(step) * 100, 3)
    assert "gradient_norm" not in told
    assert scaled.values() == before
    assert scale.value == 2.0**126
    scale.value = 1.0
    with pytest.raises(ParamsError, match="the loss is inf") as caught:
        other.take_step(lambda step: scaled.loss_at(step) * 1e38 * 1e3, 4)
    assert "bfloat16" in caught.value.fix


@pytest.mark.parametrize("value", [math.inf])
def test_what_was_learnt_must_be_finite_to_be_kept(tmp_path: Path, value: float) -> None:
    with pytest.raises(ParamsError, match="what was learnt is not finite"):
        run(tmp_path, {"checkpoint_every": 1}, rate=value)
    assert not (tmp_path / "LATEST").exists()
