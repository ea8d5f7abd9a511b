"""Noise against the covariance it is said to have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_pipeline.training.noise import NoiseShape


class Draws:
    """Standard normal values, and for which purposes they were asked."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.asked: dict[str, torch.Size] = {}

    def __call__(self, purpose: str, shape: torch.Size) -> Tensor:
        assert purpose not in self.asked
        self.asked[purpose] = shape
        source = torch.Generator().manual_seed(hash_of(purpose) + self.seed)
        return torch.randn(shape, generator=source)


def hash_of(purpose: str) -> int:
    return sum(ord(letter) * 257**place for place, letter in enumerate(purpose[-4:]))


def covariance(noise: Tensor) -> Tensor:
    """(pixels, pixels) over examples and channels."""
    flat = noise.flatten(2).flatten(0, 1).double()
    return flat.T @ flat / len(flat)


def test_without_any_of_it_there_is_one_white_draw_and_it_is_shown() -> None:
    draws = Draws()
    noise, shown = NoiseShape(0.0, 0.0, 0.0).drawn(torch.Size((2, 4, 3, 5)), draws)
    assert shown is noise
    assert draws.asked == {"noise": (2, 4, 3, 5)}
    assert torch.equal(noise, Draws()("noise", torch.Size((2, 4, 3, 5))))


def test_offset_noise_is_a_value_a_channel() -> None:
    shape = torch.Size((5000, 4, 2, 3))
    noise, shown = NoiseShape(0.5, 0.0, 0.0).drawn(shape, Draws())
    assert shown is noise
    added = noise - Draws()("noise", shape)
    torch.testing.assert_close(added, added[..., :1, :1].expand(shape), atol=1e-5, rtol=0)
    torch.testing.assert_close(covariance(noise), torch.eye(6).double() + 0.25, atol=0.05, rtol=0)
    channels = added[..., 0, 0].T.double()
    torch.testing.assert_close(channels @ channels.T / 5000, 0.25 * torch.eye(4).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize(("size", "levels"), [((4, 4), 2), ((3, 5), 2), ((1, 4), 0), ((8, 5), 3)])
def test_pyramid_noise_shares_its_coarse_levels_between_neighbours(size: tuple[int, int], levels: int) -> None:
    discount, (height, width) = 0.7, size
    draws = Draws()
    noise, _ = NoiseShape(0.0, discount, 0.0).drawn(torch.Size((6000, 4, height, width)), draws)
    assert len(draws.asked) == 1 + levels
    pixels = [(y, x) for y in range(height) for x in range(width)]
    shared = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
    for level in range(levels + 1):
        blocks = [(y >> level, x >> level) for y, x in pixels]
        shared += discount ** (2 * level) * torch.tensor([[float(a == b) for a in blocks] for b in blocks])
    expected = shared / shared[0, 0]  # each value has the variance 1
    torch.testing.assert_close(covariance(noise), expected, atol=0.04, rtol=0)


def test_the_target_does_not_know_the_perturbation() -> None:
    shape = torch.Size((500, 4, 4, 4))
    noise, shown = NoiseShape(0.0, 0.0, 0.1).drawn(shape, Draws())
    assert torch.equal(noise, Draws()("noise", shape))
    extra = (shown - noise) / 0.1
    assert extra.std().item() == pytest.approx(1.0, abs=0.02)
    assert (extra * noise).mean().item() == pytest.approx(0.0, abs=0.03)
