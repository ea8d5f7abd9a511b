"""Weights in closed form, against the dense least-squares problem they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import UNET
from lora_pipeline.injection.inject import inject_adapter, set_weights
from lora_pipeline.training.least_squares import Products, solve

SEEDS = st.integers(0, 2**20)


def found(changes: Tensor, weights: Tensor, ridge: float = 0.0) -> Tensor:
    """The weights for changes (concepts, adapters, values), where each concept is the adapter's of its number."""
    products = changes @ changes.transpose(1, 2)
    right = sum((products[j, :, j] * weights[j] for j in range(len(weights))), torch.zeros(1))
    return solve(products.sum(dim=0), right, weights, ridge)


@given(st.integers(1, 4), SEEDS)
def test_the_weights_are_those_of_the_dense_problem(count: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    changes = torch.randn(count, count, 12, generator=source, dtype=torch.float64)
    weights = torch.randn(count, generator=source, dtype=torch.float64)
    matrix = changes.transpose(1, 2).reshape(-1, count)  # (concepts * values, adapters)
    alone = torch.cat([weights[concept] * changes[concept, concept] for concept in range(count)])
    expected = torch.linalg.lstsq(matrix, alone).solution
    torch.testing.assert_close(found(changes, weights), expected, rtol=1e-7, atol=1e-9)


@given(SEEDS)
def test_adapters_that_never_meet_keep_their_weights(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    changes = torch.zeros(2, 2, 6, dtype=torch.float64)
    changes[0, 0], changes[1, 1] = torch.randn(2, 6, generator=source, dtype=torch.float64)
    weights = torch.tensor([0.7, -1.3], dtype=torch.float64)
    torch.testing.assert_close(found(changes, weights), weights)


def test_one_adapter_given_twice_shares_its_weight() -> None:
    change = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = found(change.expand(2, 2, 6), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(shared, torch.full((2,), 0.5, dtype=torch.float64))


def test_a_strong_pull_gives_the_given_weights_and_nothing_to_go_by_too() -> None:
    weights = torch.tensor([0.4, 2.0], dtype=torch.float64)
    changes = torch.rand(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(changes, weights, 1e9), weights)
    torch.testing.assert_close(found(torch.zeros(2, 2, 3, dtype=torch.float64), weights), weights)


class Model(nn.Module):
    linear: nn.Module
    conv: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv = nn.Conv2d(6, 4, 3, padding=1, stride=2)


def injected() -> tuple[Model, dict[str, Adapter]]:
    source = torch.Generator().manual_seed(1)

    def factors(out: int, *shape: int) -> LoraFactors:
        tail = [1] * (len(shape) - 1)
        return LoraFactors(torch.randn(2, *shape, generator=source), torch.randn(out, 2, *tail, generator=source), 3.0)

    model = Model().requires_grad_(False)
    adapters = {
        "a": Adapter({"unet.linear": factors(5, 6), "unet.conv": factors(4, 6, 3, 3)}, {}),
        "b": Adapter({"unet.linear": factors(5, 6)}, {}),
    }
    for name, adapter in adapters.items():
        inject_adapter(model, UNET, adapter, name)
    return model, adapters


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_products_are_those_of_the_dense_changes_whatever_is_switched_on(weight: float) -> None:
    model, adapters = injected()
    set_weights(model, lambda *_: weight)
    rows, image = torch.randn(3, 6), torch.randn(2, 6, 5, 5)
    products = Products({"b": 0.5, "a": 2.0}, lambda target: target)
    with products.watching(model, {"a"}), torch.no_grad():
        model.linear(rows)
        model.linear(2 * rows)
        model.conv(image)
    with products.watching(model, {"a", "b"}), torch.no_grad():
        model.linear(3 * rows)
    model.linear(rows)  # is not watched
    dense = torch.stack([rows @ adapters[name].factors["unet.linear"].delta().T for name in "ba"]).flatten(1).double()
    gram = dense @ dense.T
    torch.testing.assert_close(products.left["unet.linear"], 14 * gram, rtol=1e-4, atol=1e-4)
    right = 5 * gram @ torch.tensor([0.0, 2.0]).double() + 9 * gram @ torch.tensor([0.5, 2.0]).double()
    torch.testing.assert_close(products.right["unet.linear"], right, rtol=1e-4, atol=1e-4)
    change = torch.conv2d(image, adapters["a"].factors["unet.conv"].delta(), padding=1, stride=2)
    assert float(products.left["unet.conv"][1, 1]) == pytest.approx(float(change.square().sum()), rel=1e-4)
    assert products.solved(0.0)["unet.conv"] == pytest.approx({"a": 2.0, "b": 0.5})
