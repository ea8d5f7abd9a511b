"""Factors out of a live model, against what the model computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_pipeline.errors import UsageError
from lora_pipeline.injection.extraction import collapse_lora, extract_lora_ups_down
from lora_pipeline.injection.inject import inject_new, select_targets, set_weights, trainable

Randomise = Callable[[dict[str, nn.Parameter]], None]
WEIGHTS = {"a": 0.7, "b": -1.5}


class Grouped(nn.Module):
    """Every kind of layer that can be injected."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.point = nn.Conv2d(4, 5, 1)
        self.linear = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.point(torch.tanh(self.grouped(inputs)))
        output: Tensor = self.linear(hidden.flatten(2).transpose(1, 2))
        return output


@pytest.fixture
def model(generator: torch.Generator, randomise: Randomise) -> Grouped:
    """With two adapters of different ranks, alphas and weights in every layer."""
    model = Grouped()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model.requires_grad_(False).eval()
    for name, rank, alpha in (("a", 2, 5.0), ("b", 1, 0.5)):
        targets = select_targets(model, "unet", ["*"])
        inject_new(model, "unet", targets, name, rank=rank, alpha=alpha, generator=generator)
    randomise(trainable(model))
    set_weights(model, WEIGHTS)
    return model


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 6, 5, 5, generator=generator)


@torch.no_grad()
def test_the_products_are_what_the_layers_add(model: Grouped, inputs: Tensor) -> None:
    expected = model(inputs)
    pairs = extract_lora_ups_down(model)
    plain = copy.deepcopy(model)
    set_weights(plain, dict.fromkeys(WEIGHTS, 0.0))
    layers = [layer.base for layer in (plain.grouped, plain.point, plain.linear)]
    assert [tuple(up.shape) for up, _ in pairs] == [(4, 3, 1, 1), (5, 3, 1, 1), (3, 3)]
    for layer, (up, down) in zip(layers, pairs, strict=True):
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        layer.weight += (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    assert float((plain(inputs) - expected).norm() / expected.norm()) < 1e-5


@torch.no_grad()
def test_the_factors_are_copies(model: Grouped, inputs: Tensor) -> None:
    before = model(inputs)
    for up, down in extract_lora_ups_down(model):
        assert not up.requires_grad
        up.zero_()
        down.zero_()
    assert torch.equal(model(inputs), before)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, 0.5, -2.0, 0.0])
def test_collapsing_adds_alpha_times_the_change(model: Grouped, inputs: Tensor, alpha: float) -> None:
    weighted = copy.deepcopy(model)
    set_weights(weighted, {name: alpha * weight for name, weight in WEIGHTS.items()})
    expected = weighted(inputs)
    collapse_lora(model, alpha)
    assert {type(layer) for layer in (model.grouped, model.point, model.linear)} == {nn.Conv2d, nn.Linear}
    assert float((model(inputs) - expected).norm() / expected.norm()) < 1e-5


def test_a_model_without_injected_layers_has_no_factors() -> None:
    with pytest.raises(UsageError, match="no injected layers"):
        extract_lora_ups_down(Grouped())
