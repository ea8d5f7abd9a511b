"""The loop, on problems whose solution is known."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_values import train_params

from lora_pipeline.errors import CorruptError, ParamsError, ResourceError
from lora_pipeline.training.checkpoints import Position, load_checkpoint, save_checkpoint
from lora_pipeline.training.loop import LossAt, Stretch, train
from lora_pipeline.training.optimisation import guard_norms
from lora_pipeline.training.phases import TUNING, Phase

ROOT = Path(__file__).parents[3]


def silent(step: int, values: dict[str, float]) -> None:
    del step, values


def line(parameter: nn.Parameter, phase: Phase, scale: float = 1.0) -> Stretch:
    def enter() -> LossAt:
        def loss_at(step: int) -> Tensor:
            return scale * (parameter - 3.0).square().sum() if step != 4 or scale == 1.0 else parameter.sum() * scale

        return loss_at

    return Stretch(phase, {"x": parameter}, enter, lambda: None)


def every(steps: int) -> Any:
    return train_params({"checkpoint_every": steps})


def phase(steps: int, rate: float = 0.1) -> Phase:
    return Phase(TUNING, steps, rate, False, 0.0, 0.0, (0.0, 1.0))


def test_it_finds_the_minimum_and_reports_every_step(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    seen: dict[int, dict[str, float]] = {}
    losses = train(
        [line(parameter, phase(300))], tmp_path, every(1000), lambda step, values: seen.update({step: values})
    )
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 3.0), atol=0.1, rtol=0)
    assert [each.step for each in losses] == list(seen) == list(range(1, 301))
    assert losses[0].loss == pytest.approx(18.0)
    assert seen[1]["gradient_norm"] == pytest.approx(math.sqrt(72.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path, value: float) -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ParamsError, match="at step 1 of the tuning") as caught:
        train([line(parameter, phase(10), scale=value)], tmp_path, every(2), silent)
    assert caught.value.where == "tuning.learning_rate"
    torch.testing.assert_close(parameter.detach(), torch.ones(2))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train([line(nn.Parameter(torch.zeros(2)), phase(4))], tmp_path, every(2), silent)
    for stretch in (line(nn.Parameter(torch.zeros(3)), phase(4)), line(nn.Parameter(torch.zeros(2)), phase(3))):
        steps = stretch.phase.steps
        if steps == 3:
            save_checkpoint(tmp_path, 9, Position(1, 4), {"parameter.x": torch.zeros(2)})
        with pytest.raises(CorruptError, match="another run"):
            train([stretch], tmp_path, every(2), silent)


@pytest.mark.parametrize("damage", ["LATEST", "position.json", "state.safetensors", "gone"])
def test_a_damaged_checkpoint_is_refused_with_its_remedy(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 4, Position(0, 4), {"parameter.x": torch.zeros(2)})
    path = next(iter(tmp_path.rglob(damage)), tmp_path / "generation-0000000004" / "state.safetensors")
    path.unlink() if damage == "gone" else path.write_bytes(b"{")
    with pytest.raises(CorruptError) as caught:
        load_checkpoint(tmp_path)
    assert "start over" in caught.value.fix


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, Position(0, 2), {"x": torch.zeros(10)})
    with files_of_at_most(10_000), pytest.raises(ResourceError, match="no space"):
        save_checkpoint(tmp_path, 4, Position(0, 4), {"x": torch.zeros(10_000)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "generation-0000000002"]
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0] == Position(0, 2)


def test_the_guard_shortens_long_rows_and_leaves_short_ones() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    guard_norms(rows, 1.0)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
