"""Muon's update, and a batch shared by replicas, against linear algebra and plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_pipeline.toyworld.muon import Muon, is_hidden, orthogonalised
from lora_pipeline.toyworld.replicas import Replicas


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_singular_directions_stay() -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonalised(matrix) @ v.T
    assert torch.allclose(turned, torch.diag(turned.diagonal()), atol=1e-4)


def test_only_inner_matrices_of_the_unet_are_hidden() -> None:
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert is_hidden("unet.mid_block.resnets.0.conv1.weight", matrix)
    assert not is_hidden("unet.mid_block.resnets.0.conv1.bias", vector)
    assert not is_hidden("unet.conv_in.weight", matrix)
    assert not is_hidden("text_encoder.layers.0.fc1.weight", matrix)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.unet = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.unet(x)
        return y


def test_replicas_leave_the_gradient_of_the_whole_batch() -> None:
    model, whole = Toy(), Toy()
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    expected = whole(inputs).square().mean()
    expected.backward()
    with Replicas(model, 3) as replicas:
        loss = replicas.backward(lambda replica, shard: replica(inputs[shard::3]).square().mean())
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_muon_fits_what_it_can_express() -> None:
    model, teacher = Toy(), Toy()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3)
    optimiser = Muon(model, weight_decay=0.0)
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(4))
    losses = []
    for step in range(150):
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 - step / 150)
        optimiser.zero_grad()
        loss = (model(inputs) - teacher(inputs)).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
