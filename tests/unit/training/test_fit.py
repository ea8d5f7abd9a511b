"""What may be asked of a blend whose weights are learnt."""

from __future__ import annotations

from typing import Any

import pytest

from lora_pipeline.errors import ParamsError
from lora_pipeline.training.fit import Fit

GOOD: dict[str, Any] = {
    "method": "distill", "granularity": "column", "prompts": {"a": ["one"], "b": ["two"]}, "draws": 1, "steps": 1,
    "learning_rate": 0.1, "regularisation": 0.0, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"method": "sum"}, "method"),
        ({"granularity": "layer"}, "granularity"),
        ({"method": "least_squares"}, "granularity"),
        ({"draws": 0}, "draws"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"regularisation": -0.1}, "regularisation"),
        ({"regularisation": float("inf")}, "regularisation"),
    ],
)
def test_a_value_out_of_its_range_is_refused(change: dict[str, Any], where: str) -> None:
    Fit(**GOOD)
    with pytest.raises(ParamsError) as refused:
        Fit(**GOOD | change)
    assert refused.value.where == where


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "c"], ["a", "a", "b"]])
def test_every_adapter_has_prompts_and_nothing_else_has(names: list[str]) -> None:
    Fit(**GOOD).scenes(["b", "a"])
    with pytest.raises(ParamsError):
        Fit(**GOOD).scenes(names)


def test_prompts_may_be_for_several_adapters_together() -> None:
    scenes = Fit(**GOOD | {"prompts": {"a+b": ["both"], "b": ["two"], "c+d": ["one"]}}).scenes(["a", "b", "c+d"])
    assert [scene.adapters for scene in scenes] == [("a", "b"), ("b",), ("c+d",)]
