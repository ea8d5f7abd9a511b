"""Conversions: what is asked for happens, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.conversion import PRECISIONS, convert
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.errors import CorruptError, UsageError

Make = Callable[..., Adapter]


def test_without_a_wish_nothing_changes(make_adapter: Make) -> None:
    adapter = make_adapter(1, tokens=("<a>",))
    conversion = convert("x", adapter, base=None, rule=None, dtype=None)
    assert conversion.adapter is adapter
    assert conversion.layers == {}


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_dtype_is_for_all_that_is_understood(make_adapter: Make, dtype: str) -> None:
    adapter = replace(make_adapter(1, tokens=("<a>",)), foreign={"x": torch.ones(1, dtype=torch.float64)})
    target = min(adapter.factors)
    adapter = replace(adapter, magnitudes={target: torch.ones(8, 1)}, embeddings_2={"<a>": torch.ones(1, 4)})
    made = convert("x", adapter, base=None, rule=None, dtype=dtype).adapter
    understood = [made.embeddings["<a>"], made.embeddings_2["<a>"], made.magnitudes[target]]
    understood += [side for factors in made.factors.values() for side in (factors.down, factors.up)]
    assert {tensor.dtype for tensor in understood} == {PRECISIONS[dtype]}
    assert made.foreign["x"].dtype == torch.float64
    for name, factors in made.factors.items():
        assert factors.alpha == adapter.factors[name].alpha
        assert torch.equal(factors.up, adapter.factors[name].up.to(PRECISIONS[dtype]))


def test_a_cut_is_measured_over_all_layers(make_adapter: Make) -> None:
    adapter = make_adapter(3)
    conversion = convert("x", adapter, base=None, rule=RankRule("rank", 1), dtype=None)
    before = torch.cat([each.delta().flatten() for each in adapter.factors.values()])
    after = torch.cat([conversion.adapter.factors[target].delta().flatten() for target in adapter.factors])
    assert conversion.residual == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4)
    assert conversion.layers.keys() == adapter.factors.keys()


def test_a_dora_is_not_cut_without_its_base(make_adapter: Make) -> None:
    adapter = make_adapter(3)
    adapter = replace(adapter, magnitudes={min(adapter.factors): torch.ones(8, 1)})
    with pytest.raises(CorruptError, match="x: is a DoRA"):
        convert("x", adapter, base=None, rule=RankRule("rank", 1), dtype=None)


def test_an_unknown_dtype_and_an_overflow_are_refused(make_adapter: Make) -> None:
    with pytest.raises(UsageError, match="int8"):
        convert("x", make_adapter(1), base=None, rule=None, dtype="int8")
    with pytest.raises(CorruptError, match="<a>: is beyond the range of float16"):
        convert("x", Adapter({}, {"<a>": torch.full((1, 4), 1e5)}), base=None, rule=None, dtype="float16")
