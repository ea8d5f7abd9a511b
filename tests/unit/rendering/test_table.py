"""The table of weights, against weights worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import ParamsError
from lora_pipeline.rendering.schedule import WeightSchedule, schedule
from lora_pipeline.rendering.table import WeightTable, table_of

LOW, HIGH = "unet.down_blocks.0.attentions.0.proj_in", "unet.up_blocks.1.attentions.0.proj_in"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def factors(seed: int, size: float = 1.0, rank: int = 1) -> LoraFactors:
    source = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 4, generator=source), torch.randn(3, rank, generator=source)
    return LoraFactors(down * size, up, float(rank))


TWO = {"zorp": {LOW: factors(1), HIGH: factors(2), TEXT: factors(3)}, "ink": {LOW: factors(4), HIGH: factors(5)}}


def dense(table: WeightTable) -> np.ndarray:
    """(steps, adapters, targets) where each step has one row."""
    return np.stack([table.rows[row] for (row,) in table.steps])


def test_weights_are_the_schedules_times_the_blocks() -> None:
    schedules = {
        "zorp": schedule([(0.0, 0.0), (1.0, 2.0)]),
        "ink": schedule(0.5, blocks={"IN01": 0.5, "*up_blocks*": 0.0}),
    }
    table = table_of(schedules, TWO, 3)
    assert table.targets == (TEXT, LOW, HIGH)
    expected = [[[w, w, w], [0.0, 0.25, 0.0]] for w in (0.0, 1.0, 2.0)]
    np.testing.assert_allclose(dense(table), expected)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=9))
def test_equal_rows_are_there_once(weights: list[float]) -> None:
    last = max(1, len(weights) - 1)
    knots = tuple((index / last, weight) for index, weight in enumerate(weights))
    table = table_of({"zorp": WeightSchedule(knots, "hold")}, {"zorp": TWO["zorp"]}, len(weights))
    assert len(table.rows) == len(set(weights))
    np.testing.assert_array_equal(dense(table)[:, 0, 0], weights)
    assert table.changes() == 1 + sum(a != b for a, b in pairwise(weights))


def test_what_concerns_one_model_has_rows_of_its_own() -> None:
    table = table_of({"zorp": schedule([(0.0, 0.0), (1.0, 1.0)], blocks={"BASE": 0.0})}, {"zorp": TWO["zorp"]}, 4)
    text, unet = table.of_model("text_encoder"), table.of_model("unet")
    assert (text.targets, len(text.rows)) == ((TEXT,), 1)
    assert (unet.targets, len(unet.rows)) == ((LOW, HIGH), 4)


def test_turns_are_taken_and_composites_are_apart() -> None:
    both = {"zorp": schedule(1.0), "ink": schedule(0.5)}
    turns = dense(table_of(both, TWO, 5, "switch", every=2))[:, :, 1]
    np.testing.assert_array_equal(turns, [[1, 0], [1, 0], [0, 0.5], [0, 0.5], [1, 0]])
    apart = table_of(both, TWO, 2, "composite")
    assert apart.steps == ((0, 1), (0, 1))
    np.testing.assert_array_equal(apart.rows[:, :, 1], [[1, 0], [0, 0.5]])


def test_k_lora_takes_the_stronger_and_lets_the_style_in_late() -> None:
    """Two layers, in one of which the style is weak; its weight rises from 0.5 to 2 over the run."""
    strong = {LOW: factors(1), HIGH: factors(1)}
    style = {LOW: factors(1), HIGH: factors(1, size=0.1)}
    table = table_of({"zorp": schedule(1.0), "ink": schedule(1.0)}, {"zorp": strong, "ink": style}, 4, "k_lora")
    chosen = dense(table)
    assert (chosen.sum(axis=1) == 1.0).all()
    balance = 2.0 / 1.1
    for step, progress in enumerate((0.0, 1 / 3, 2 / 3, 1.0)):
        for column, strength in ((0, 1.0), (1, 0.1)):
            subject = strength * (1.5 * progress + 0.5) * balance <= 1.0
            assert chosen[step, 0, column] == float(subject), (step, column)


def test_k_lora_is_for_two() -> None:
    with pytest.raises(ParamsError, match="there are 1 adapters"):
        table_of({"zorp": schedule(1.0)}, {"zorp": TWO["zorp"]}, 2, "k_lora")


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"'\*nothing\*' matches no layer") as refusal:
        table_of({"zorp": schedule(1.0, blocks={"*nothing*": 0.0})}, TWO, 2)
    assert refusal.value.where == "weights.zorp.blocks"
