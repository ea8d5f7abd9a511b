"""Noise levels that are drawn, against the distributions they are said to have."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from lora_pipeline.errors import ParamsError
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.timesteps import levels_of

WINDOWS = [(0.0, 1.0), (0.0, 0.8), (0.5, 1.0), (0.25, 0.5), (0.29, 0.3), (0.0, 0.001), (0.999, 1.0)]


def drawn(window: tuple[float, float], logit_normal: bool, total: int = 1000, batch: int = 32) -> Tensor:
    """Of enough steps for 8000 levels."""
    levels = levels_of(window, total, logit_normal, "tuning.timesteps")
    return torch.stack([levels.drawn(batch, generator_for(0, "a", step, "t")) for step in range(8000 // batch)])


def test_uniform_levels_are_uniform_and_spread() -> None:
    found = drawn((0.0, 1.0), False, total=100, batch=4)
    assert found.min() == 0
    assert found.max() == 99
    for column in found.T:  # a uniform share of each quarter: 500 ± 4 standard errors
        assert (torch.bincount(column // 25, minlength=4) - 500).abs().max() < 80
    assert all(sorted((row // 25).tolist()) == [0, 1, 2, 3] for row in found)


@pytest.mark.parametrize("total", [10, 1000, 999])
def test_the_whole_window_is_the_floor_of_evenly_spread_places(total: int) -> None:
    levels = levels_of((0.0, 1.0), total, False, "tuning.timesteps")
    for step in range(50):
        offset = torch.rand(1, generator=generator_for(3, "tuning", step, "t"), dtype=torch.float64).item()
        expected = [math.floor((offset + i / 5) % 1.0 * total) for i in range(5)]
        assert levels.drawn(5, generator_for(3, "tuning", step, "t")).tolist() == expected


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("logit_normal", [False, True])
def test_a_window_is_never_left_and_reached_to_its_ends(window: tuple[float, float], logit_normal: bool) -> None:
    found = drawn(window, logit_normal)
    first, last = round(window[0] * 1000), round(window[1] * 1000)
    assert found.dtype == torch.int64
    assert first <= int(found.min()) <= int(found.max()) < last
    if not logit_normal:
        assert int(found.max()) - int(found.min()) > 0.95 * (last - first) - 1
        counts = torch.bincount((found.flatten() - first) * 2 // (last - first))
        if last - first > 1:  # either half of the window as often as the other
            assert counts.tolist() == pytest.approx([4000, 4000], rel=0.1)


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.2, 0.9), (0.6, 1.0)])
def test_logit_normal_levels_have_its_quantiles_within_the_window(window: tuple[float, float]) -> None:
    normal = NormalDist()

    def below(place: float) -> float:
        return 0.0 if place <= 0 else 1.0 if place >= 1 else normal.cdf(math.log(place / (1 - place)))

    found = drawn(window, True).flatten().sort().values
    low, high = below(window[0]), below(window[1])
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        quantile = normal.inv_cdf(low + share * (high - low))
        expected = 1000 / (1 + math.exp(-quantile))
        assert found[int(share * len(found))].item() == pytest.approx(expected, abs=12)


@pytest.mark.parametrize("total", [10, 1000, 37])
def test_windows_that_share_an_edge_share_no_step_and_leave_none_out(total: int) -> None:
    for edge in (0.07, 0.29, 0.5, 0.813):
        low, high = levels_of((0.0, edge), total, False, "a"), levels_of((edge, 1.0), total, False, "a")
        assert (low.first, low.last, high.last) == (0, high.first, total)


def test_a_window_without_a_step_is_refused_by_its_key() -> None:
    with pytest.raises(ParamsError, match=r"inversion\.timesteps.*none of the base's 10"):
        levels_of((0.41, 0.43), 10, False, "inversion.timesteps")
