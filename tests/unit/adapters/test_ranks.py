"""Rank rules, against their definitions on a known spectrum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_pipeline.adapters.ranks import RankRule, rank_rule
from lora_pipeline.errors import ParamsError

VALUES = torch.tensor([4.0, 2.0, 1.0, 0.5])  # squares 16, 4, 1, 0.25


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (RankRule("rank", 3), 3),
        (RankRule("rank", 9), 4),
        (RankRule("energy", 16 / 21.25), 1),
        (RankRule("energy", 0.9), 2),
        (RankRule("energy", 1.0), 4),
        (RankRule("error", (1.25 / 21.25) ** 0.5), 2),
        (RankRule("error", 0.0), 4),
        (RankRule("ratio", 0.3), 2),
        (RankRule("threshold", 0.9), 3),
        (RankRule("threshold", 9.0), 1),
        (RankRule("energy", 1.0, at_most=2), 2),
    ],
)
def test_each_rule_keeps_what_it_says(rule: RankRule, count: int) -> None:
    assert rule.choose(VALUES) == count


def test_nothing_is_kept_of_nothing() -> None:
    assert RankRule("energy", 0.5).choose(torch.zeros(3)) == 0


def test_energy_is_of_the_whole_spectrum() -> None:
    assert RankRule("energy", 0.5).choose(VALUES[:3], total=42.0) == 3


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0.0, 0.99))
def test_an_error_bound_holds_with_no_value_to_spare(numbers: list[float], bound: float) -> None:
    values = torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)
    count = RankRule("error", bound).choose(values)
    whole = float(values.norm())
    assert float(values[count:].norm()) <= bound * whole + 1e-5 * whole
    assert count == 1 or float(values[count - 1 :].norm()) > bound * whole - 1e-5 * whole


@pytest.mark.parametrize(
    ("kind", "value"),
    [("rank", 0), ("rank", 1.5), ("energy", 0.0), ("energy", 1.1), ("error", 1.0), ("error", -0.1), ("ratio", 1.0),
     ("threshold", -1.0), ("threshold", float("inf")), ("rank", float("nan"))],
)  # fmt: skip
def test_values_out_of_range_are_refused(kind: str, value: float) -> None:
    with pytest.raises(ParamsError, match=kind):
        RankRule(kind, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choice", "rule"),
    [
        (None, None),
        (4, RankRule("rank", 4)),
        ({"energy": 0.9}, RankRule("energy", 0.9)),
        ({"threshold": 2.0, "max_rank": 8.0}, RankRule("threshold", 2.0, 8)),
    ],
)
def test_a_value_of_params_is_a_rule(choice: int | dict[str, float] | None, rule: RankRule | None) -> None:
    assert rank_rule(choice) == rule


@pytest.mark.parametrize("choice", [0, {}, {"max_rank": 4.0}, {"energy": 0.9, "error": 0.1}, {"rank": 4.0}])
def test_a_value_that_is_no_rule_is_refused(choice: int | dict[str, float]) -> None:
    with pytest.raises(ParamsError, match="rank"):
        rank_rule(choice)
