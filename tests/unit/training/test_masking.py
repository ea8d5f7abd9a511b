"""Masked losses against a loop over pixels."""

from __future__ import annotations

import pytest
import torch

from lora_pipeline.training.masking import pixel_weights
from lora_pipeline.training.objective import distances


def masks() -> torch.Tensor:
    """(2, 1, 8, 12), of every grey."""
    return torch.rand(2, 1, 8, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("background", [0.0, 0.1, 1.0])
def test_weights_are_means_over_a_latents_area_and_of_mean_one(background: float) -> None:
    found = pixel_weights(masks(), (4, 3), background)
    assert found.shape == (2, 1, 4, 3)
    for picture, weights in zip(masks()[:, 0], found[:, 0], strict=True):
        dense = [
            [background + (1 - background) * picture[2 * y : 2 * y + 2, 4 * x : 4 * x + 4].mean() for x in range(3)]
            for y in range(4)
        ]
        expected = torch.tensor(dense)
        torch.testing.assert_close(weights, expected / expected.mean())
        assert weights.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("background", [0.0, 0.3])
def test_black_counts_as_the_background_against_white(background: float) -> None:
    half = torch.zeros(1, 1, 4, 4)
    half[..., :2] = 1.0
    weights = pixel_weights(half, (2, 2), background)[0, 0]
    torch.testing.assert_close(weights[:, 1], background * weights[:, 0])


@pytest.mark.parametrize("delta", [None, 0.1])
def test_gradients_are_those_of_the_dense_sum(delta: float | None) -> None:
    source = torch.Generator().manual_seed(1)
    target, start = (torch.randn(2, 4, 4, 3, generator=source).double() for _ in range(2))
    weights = pixel_weights(masks().double(), (4, 3), 0.2)
    prediction, dense = start.clone().requires_grad_(), start.clone().requires_grad_()
    distances(prediction, target, delta, weights).sum().backward()
    total = torch.zeros((), dtype=torch.float64)
    for n in range(2):
        for c in range(4):
            for y in range(4):
                for x in range(3):
                    e = dense[n, c, y, x] - target[n, c, y, x]
                    cost = e**2 if delta is None else 2 * delta**2 * ((1 + (e / delta) ** 2).sqrt() - 1)
                    total = total + weights[n, 0, y, x] * cost / (4 * 4 * 3)
    total.backward()
    torch.testing.assert_close(prediction.grad, dense.grad)


def test_a_white_mask_changes_nothing() -> None:
    weights = pixel_weights(torch.ones(1, 1, 8, 8), (4, 4), 0.3)
    torch.testing.assert_close(weights, torch.ones(1, 1, 4, 4))
