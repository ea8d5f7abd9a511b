from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_pipeline.injection.inject import inject_new
from lora_pipeline.injection.layers import LoraInjectedLinear
from lora_pipeline.rendering.schedule import ScheduledWeights, schedule

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


def test_models_are_touched_only_when_a_weight_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_new(model, "unet", ["unet.0"], "zorp", rank=1, alpha=1.0, generator=torch.Generator())
    layer = model[0]
    assert isinstance(layer, LoraInjectedLinear)
    weights_at = ScheduledWeights([model], {"zorp": schedule([(0.5, 0.0), (1.0, 2.0)])})
    seen = []
    for progress in (0.0, 0.4, 0.75, 1.0, 0.0):
        weights_at(progress)
        seen.append(layer.branches["zorp"].weight)
    assert seen == [0.0, 0.0, 1.0, 2.0, 0.0]
    layer.branches["zorp"].weight = 7.0
    weights_at(0.25)  # the same weight as before
    assert layer.branches["zorp"].weight == 7.0
