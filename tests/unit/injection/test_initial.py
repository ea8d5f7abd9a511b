"""What new factors start from."""

from __future__ import annotations

import math

import pytest
import torch

from lora_pipeline.injection.initial import INITS

SHAPES = [torch.Size((640,)), torch.Size((64, 3, 3))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "deviation"), [("kaiming", None), ("normal", 1 / 8), ("orthogonal", None)])
def test_each_has_the_size_it_says(name: str, deviation: float | None, shape: torch.Size) -> None:
    down = INITS[name](8, shape, torch.Generator().manual_seed(0))
    assert down.shape == (8, *shape)
    expected = deviation or 1 / math.sqrt(3 * math.prod(shape))  # of a uniform value to 1 / sqrt(fan in)
    assert float(down.std()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_rows_are_orthogonal_and_of_one_length(shape: torch.Size) -> None:
    rows = INITS["orthogonal"](8, shape, torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8) / 3, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", INITS)
def test_the_generator_decides(name: str) -> None:
    one, again, other = (INITS[name](4, SHAPES[0], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
