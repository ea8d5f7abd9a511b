"""Injected layers, against the same layers with the change added to their weights."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.injection.branches import LoraBranch
from lora_pipeline.injection.layers import LoraInjectedConv2d, LoraInjectedLinear

Layer = TypeVar("Layer", bound=nn.Module)


def frozen(layer: Layer, generator: torch.Generator) -> Layer:
    """A layer with known random weights."""
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer.requires_grad_(False)


def random_factors(weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> LoraFactors:
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
    return LoraFactors(down, up, alpha)


def assert_equals_changed_weight(
    layer: LoraInjectedLinear | LoraInjectedConv2d, base: nn.Module, inputs: Tensor, change: Tensor
) -> None:
    output = layer(inputs)
    weight = base.weight
    assert isinstance(weight, Tensor)
    weight.data += change
    expected = base(inputs)
    weight.data -= change
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 2, 3, 7)])
def test_linear_for_any_leading_shape(shape: tuple[int, ...], generator: torch.Generator) -> None:
    base = frozen(nn.Linear(7, 5), generator)
    layer = LoraInjectedLinear(base, "unet.x")
    first, second = (random_factors(base.weight, rank, 2.0, generator) for rank in (3, 2))
    layer.add_branch("first", LoraBranch(first, trainable=False))
    layer.add_branch("second", LoraBranch(second, trainable=False))
    layer.branches["first"].weight = -0.5
    change = second.delta() - 0.5 * first.delta()
    assert_equals_changed_weight(layer, base, torch.randn(shape, generator=generator), change)


@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.sampled_from([1, 3, (1, 3)]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1, (0, 2)]),
    dilation=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    rank=st.integers(1, 5),
    weight=st.floats(-2, 2),
)
def test_convolution_with_the_bases_geometry(
    groups: int, kernel: Any, stride: int, padding: Any, dilation: int, mode: Any, rank: int, weight: float
) -> None:
    source = torch.Generator().manual_seed(rank)
    base = nn.Conv2d(4, 8, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode)
    frozen(base, source)
    layer = LoraInjectedConv2d(base, "unet.x")
    factors = random_factors(base.weight, rank, 1.5, source)
    layer.add_branch("a", LoraBranch(factors, trainable=False))
    layer.branches["a"].weight = weight
    inputs = torch.randn(2, 4, 9, 9, generator=source)
    assert_equals_changed_weight(layer, base, inputs, weight * factors.delta())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_half_precision_base_rounds_the_sum_once(dtype: torch.dtype, kind: str, generator: torch.Generator) -> None:
    base = frozen(nn.Linear(16, 8) if kind == "linear" else nn.Conv2d(16, 8, 1), generator).to(dtype)
    layer = LoraInjectedLinear(base, "x") if isinstance(base, nn.Linear) else LoraInjectedConv2d(base, "x")
    factors = random_factors(base.weight, 2, 0.01, generator)
    inputs = torch.randn((4, 16) if kind == "linear" else (2, 16, 3, 3), generator=generator).to(dtype)
    layer.add_branch("a", LoraBranch(factors, trainable=False))
    output = layer(inputs)
    assert output.dtype == dtype
    assert layer.branches["a"].down.dtype == torch.float32
    function = nn.functional.linear if kind == "linear" else nn.functional.conv2d
    exact = base(inputs).double() + function(inputs.double(), factors.delta().double())
    error = (output.double() - exact).abs() / exact.abs().clamp_min(1e-3)
    assert float(error.max()) <= torch.finfo(dtype).eps


def test_weight_zero_is_the_base_bit_for_bit(generator: torch.Generator) -> None:
    base = frozen(nn.Linear(7, 5), generator)
    layer = LoraInjectedLinear(base, "x")
    layer.add_branch("a", LoraBranch(random_factors(base.weight, 2, 1.0, generator), trainable=True))
    layer.branches["a"].weight = 0.0
    inputs = torch.randn(3, 7, generator=generator)
    assert torch.equal(layer(inputs), base(inputs))


def test_gradients_are_those_of_the_formula(generator: torch.Generator) -> None:
    base = frozen(nn.Linear(7, 5), generator)
    layer = LoraInjectedLinear(base, "x")
    factors = random_factors(base.weight, 2, 3.0, generator)
    layer.add_branch("a", LoraBranch(factors, trainable=True))
    inputs = torch.randn(3, 7, generator=generator)
    layer(inputs).square().sum().backward()
    down, up = factors.down.clone().requires_grad_(), factors.up.clone().requires_grad_()
    (base(inputs) + 1.5 * inputs @ down.T @ up.T).square().sum().backward()
    branch = layer.branches["a"]
    torch.testing.assert_close(branch.down.grad, down.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(branch.up.grad, up.grad, rtol=1e-4, atol=1e-4)


def test_branches_follow_the_model_and_take_any_name() -> None:
    layer = LoraInjectedLinear(nn.Linear(2, 2), "x")
    for name in ("my.style", "keys", ""):
        layer.add_branch(name, LoraBranch(LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0), trainable=True))
    assert layer.to(torch.float64).branches["my.style"].down.dtype == torch.float64
    assert len(list(layer.parameters())) == 2 + 3 * 2


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_small_layer_that_learns_gives_what_two_products_give(
    shape: tuple[int, ...], bias: bool, generator: torch.Generator
) -> None:
    base = frozen(nn.Linear(7, 5, bias=bias), generator)
    layer = LoraInjectedLinear(base, "unet.x")
    branch = LoraBranch(random_factors(base.weight, 3, 2.0, generator), trainable=True)
    layer.add_branch("a", branch)
    branch.weight = -0.5
    inputs = torch.randn(shape, generator=generator).requires_grad_()
    gradient = torch.randn(*shape[:-1], 5, generator=generator)
    learning = [inputs, branch.down, branch.up]
    expected = base(inputs) - 0.5 * 2.0 / 3 * (inputs @ branch.down.t() @ branch.up.t())
    found = layer(inputs)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(output, learning, gradient) for output in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("width", "dtype", "learns"),
    [(8, "float32", True), (8, "bfloat16", True), (300, "float32", True), (8, "float32", False)],
)
def test_only_a_small_float32_layer_that_learns_computes_no_product_of_its_inputs(
    width: int, dtype: str, learns: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = frozen(nn.Linear(width, width), generator).to(getattr(torch, dtype))
    layer = LoraInjectedLinear(base, "unet.x")
    layer.add_branch("a", LoraBranch(random_factors(base.weight, 2, 1.0, generator), trainable=learns))
    products: list[LoraBranch] = []
    changed = layer.changed

    def noted(output: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
        products.append(branch)
        return changed(output, inputs, branch)

    monkeypatch.setattr(layer, "changed", noted)
    layer(torch.randn(3, width, generator=generator).to(base.weight.dtype))
    small = width == 8 and dtype == "float32" and learns
    assert bool(products) is not small
