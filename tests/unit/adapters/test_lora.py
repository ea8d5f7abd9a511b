"""The change of a layer, against the layers themselves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lora_pipeline.adapters.lora import LoraFactors, concatenated, fitted
from lora_pipeline.errors import CorruptError


def test_a_linear_change_is_two_layers_in_a_row(generator: torch.Generator) -> None:
    down, up = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)
    inputs = torch.randn(4, 7, generator=generator)
    expected = F.linear(F.linear(inputs, down), up) * (1.5 / 3)
    torch.testing.assert_close(F.linear(inputs, LoraFactors(down, up, 1.5).delta()), expected)


def test_a_convolution_change_is_a_convolution_and_a_1x1(generator: torch.Generator) -> None:
    down, up = torch.randn(2, 4, 3, 3, generator=generator), torch.randn(6, 2, 1, 1, generator=generator)
    inputs = torch.randn(1, 4, 8, 8, generator=generator)
    expected = F.conv2d(F.conv2d(inputs, down, stride=2, padding=1), up) * (4.0 / 2)
    delta = LoraFactors(down, up, 4.0).delta()
    torch.testing.assert_close(F.conv2d(inputs, delta, stride=2, padding=1), expected, rtol=1e-5, atol=1e-5)


def test_delta_is_float32_for_half_precision_factors() -> None:
    factors = LoraFactors(torch.ones(1, 2, dtype=torch.float16), torch.ones(3, 1, dtype=torch.float16), 1.0)
    assert factors.delta().dtype == torch.float32


@pytest.mark.parametrize("weight", [-2.0, 0.0, 0.3, 1.0])
def test_a_weight_multiplies_the_change_once(weight: float, generator: torch.Generator) -> None:
    factors = LoraFactors(torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator), 3.0)
    torch.testing.assert_close(factors.scaled(weight).delta(), weight * factors.delta())


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        ((2, 3), (4, 3), 1.0),
        ((2, 3), (4, 2, 1, 1), 1.0),
        ((2, 3, 3, 3), (4, 2, 3, 3), 1.0),
        ((0, 3), (4, 0), 1.0),
        ((3,), (4, 3), 1.0),
        ((2, 3), (4, 2), math.nan),
        ((2, 3), (4, 2), math.inf),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(
    down: tuple[int, ...], up: tuple[int, ...], alpha: float
) -> None:
    with pytest.raises(CorruptError):
        LoraFactors(torch.zeros(down), torch.zeros(up), alpha)


def test_linear_factors_fit_a_1x1_convolution_and_back(generator: torch.Generator) -> None:
    factors = LoraFactors(torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator), 1.0)
    shaped = fitted("x", factors, (4, 3, 1, 1))
    assert shaped.delta().shape == (4, 3, 1, 1)
    assert torch.equal(fitted("x", shaped, (4, 3)).delta(), factors.delta())


def test_factors_of_another_layer_are_refused_by_name() -> None:
    factors = LoraFactors(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)
    with pytest.raises(CorruptError, match=r"unet\.x: .*\(4, 3\).*\(4, 5\)"):
        fitted("unet.x", factors, (4, 5))
    with pytest.raises(CorruptError):
        concatenated([(factors, 1.0), (LoraFactors(torch.zeros(2, 5), torch.zeros(4, 2), 1.0), 1.0)])
