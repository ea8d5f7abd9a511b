"""The objective against the formulas, and its draws against their distribution."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from train_values import train_params

from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.training.draws import batch_indices, generator_for
from lora_pipeline.training.noising import NoiseSchedule, noised, schedule_of, target_of
from lora_pipeline.training.objective import distances
from lora_pipeline.training.phases import phases_of
from lora_pipeline.training.weighting import prior_weights

BATCH, STEPS = 6, 10


def schedule(prediction: str) -> NoiseSchedule:
    cumulated = torch.linspace(0.99, 0.0, STEPS)
    config = SimpleNamespace(prediction_type=prediction)
    return schedule_of(SimpleNamespace(config=config, alphas_cumprod=cumulated))


def draws() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and timesteps."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(BATCH, 4, 3, 3, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([0, 2, 4, 6, 8, 9])


def angles(timesteps: Tensor) -> Tensor:
    """With signal = cos φ and noise = sin φ, v is the derivative of x_t by φ (arXiv:2202.00512, appendix D)."""
    return torch.acos(torch.linspace(0.99, 0.0, STEPS).double().sqrt())[timesteps].view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_latents_are_turned_towards_the_noise_and_the_target_is_how(prediction: str) -> None:
    x, noise, timesteps = draws()
    angle = angles(timesteps)
    torch.testing.assert_close(
        noised(schedule(prediction), x, noise, timesteps).double(), angle.cos() * x + angle.sin() * noise
    )
    step = 1e-6
    ahead, behind = ((angle + d).cos() * x + (angle + d).sin() * noise for d in (step, -step))
    expected = {"epsilon": noise, "sample": x, "v_prediction": (ahead - behind) / (2 * step)}[prediction]
    target = target_of(schedule(prediction), x, noise, timesteps)
    torch.testing.assert_close(target.double(), expected.double(), atol=1e-6, rtol=1e-6)


def test_weights_make_the_sum_of_two_means() -> None:
    _, noise, _ = draws()
    losses = distances(torch.zeros_like(noise), noise, None, None)
    alone = noise.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, alone)
    together = (prior_weights(4, 2, 0.3) * losses).sum()
    torch.testing.assert_close(together, alone[:4].mean() + 0.3 * alone[4:].mean())
    assert prior_weights(2, 0, 1.0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("delta", [0.01, 0.1, 3.0])
def test_huber_is_square_below_delta_and_linear_above(delta: float) -> None:
    def huber(error: float) -> Tensor:
        return distances(torch.full((1, 1, 1, 1), error).double(), torch.zeros(1, 1, 1, 1).double(), delta, None)[0]

    for error in (1e-2, 0.5, 2.0, 1e4):
        pseudo = 2 * delta**2 * (math.hypot(1.0, error / delta) - 1.0)
        assert huber(error).item() == pytest.approx(pseudo, rel=1e-6)
    assert huber(1e-5 * delta).item() == pytest.approx((1e-5 * delta) ** 2, rel=1e-6)
    assert huber(1e6 * delta).item() == pytest.approx(2 * delta * 1e6 * delta, rel=1e-5)


def test_errors_are_in_the_precision_of_the_target() -> None:
    _, noise, _ = draws()
    found = distances(noise.bfloat16(), noise, None, None)
    torch.testing.assert_close(found, (noise.bfloat16().float() - noise).square().mean(dim=(1, 2, 3)))


def test_unknown_predictions_are_refused() -> None:
    with pytest.raises(CorruptError, match="'flow'"):
        schedule("flow")


@pytest.mark.parametrize(("count", "batch"), [(5, 4), (5, 5), (3, 7), (1, 2)])
def test_every_epoch_shows_each_example_once(count: int, batch: int) -> None:
    steps = count * 3
    seen = [i for step in range(steps) for i in batch_indices(count, batch, step, 0, "tuning", "instances")]
    epochs = [seen[start : start + count] for start in range(0, len(seen), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 3 or len({tuple(epoch) for epoch in epochs}) > 1


def test_draws_depend_on_each_of_their_names() -> None:
    names = [(0, "a", 0, "x"), (1, "a", 0, "x"), (0, "b", 0, "x"), (0, "a", 1, "x"), (0, "a", 0, "y")]
    values = {torch.rand(1, generator=generator_for(*each)).item() for each in names}
    assert len(values) == len(names)
    assert torch.rand(1, generator=generator_for(*names[0])).item() in values


@pytest.mark.parametrize(
    ("method", "names"),
    [("ti", ["inversion"]), ("lora", ["tuning"]), ("dreambooth", ["tuning"]), ("pti", ["inversion", "tuning"])],
)
def test_methods_are_their_phases(method: str, names: list[str]) -> None:
    assert [phase.name for phase in phases_of(train_params({"method": method}))] == names


def test_impossible_methods_are_refused() -> None:
    with pytest.raises(ParamsError, match="'lycoris' is no method"):
        phases_of(train_params({"method": "lycoris"}))
    with pytest.raises(ParamsError, match=r"inversion\.steps"):
        phases_of(train_params({"inversion.steps": 0}))
    phases_of(train_params({"method": "lora", "inversion.steps": 0}))
