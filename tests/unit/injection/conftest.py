"""A small model with a module tree like a UNet's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Block(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 6, 1)
        self.to_q = nn.Linear(6, 6)
        self.to_out = nn.ModuleList([nn.Linear(6, 5, bias=False), nn.Identity()])

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.point(torch.relu(self.conv(inputs))).flatten(2).transpose(1, 2)
        output: Tensor = self.to_out[0](torch.relu(self.to_q(hidden)))
        return output


class Model(nn.Module):
    """A block under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.block(inputs)
        return output


@pytest.fixture
def model(generator: torch.Generator) -> Model:
    model = Model()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False).eval()


@pytest.fixture
def randomise(generator: torch.Generator) -> Callable[[dict[str, nn.Parameter]], None]:
    def fill(parameters: dict[str, nn.Parameter]) -> None:
        assert parameters
        for parameter in parameters.values():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    return fill
