from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_pipeline.rendering.schedule import BETWEEN, WeightSchedule, schedule

WEIGHTS = st.floats(-4, 4)
PLACES = st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True).map(sorted)


@st.composite
def knots(draw: st.DrawFn) -> list[tuple[float, float]]:
    return [(place / 1000, draw(WEIGHTS)) for place in draw(PLACES)]


@given(knots(), st.floats(0, 1))
def test_weights_are_numpys_interpolation(knots: list[tuple[float, float]], progress: float) -> None:
    places, weights = zip(*knots, strict=True)
    assert schedule(knots).at(progress) == pytest.approx(np.interp(progress, places, weights), abs=1e-9)


@given(knots())
def test_knots_are_met_exactly(knots: list[tuple[float, float]]) -> None:
    assert [schedule(knots).at(place) for place, _ in knots] == [weight for _, weight in knots]


@given(WEIGHTS, st.floats(0, 1))
def test_a_number_is_constant(weight: float, progress: float) -> None:
    assert schedule(weight).at(progress) == weight


@given(knots(), st.floats(0, 1))
def test_every_way_between_knots_stays_between_them(knots: list[tuple[float, float]], progress: float) -> None:
    weights = [weight for _, weight in knots]
    for between in BETWEEN:
        told = WeightSchedule(tuple(knots), between)
        assert min(weights) - 1e-9 <= told.at(progress) <= max(weights) + 1e-9
        assert [told.at(place) for place, _ in knots] == pytest.approx(weights)


def test_hold_waits_and_cosine_is_soft() -> None:
    ends = ((0.0, 0.0), (1.0, 2.0))
    assert [WeightSchedule(ends, "hold").at(place) for place in (0.0, 0.99, 1.0)] == [0.0, 0.0, 2.0]
    assert WeightSchedule(ends, "cosine").at(0.25) == pytest.approx(1 - np.cos(np.pi / 4))
    assert WeightSchedule(ends, "cosine").at(0.5) == pytest.approx(1.0)


def test_outside_its_window_an_adapter_is_off() -> None:
    told = schedule(1.5, window=(0.2, 0.6))
    assert [told.at(place) for place in (0.0, 0.19, 0.2, 0.6, 0.61, 1.0)] == [0, 0, 1.5, 1.5, 0, 0]
