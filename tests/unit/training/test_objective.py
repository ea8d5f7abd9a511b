"""The objective against the formulas, and its draws against their distribution."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from train_values import train_params

from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.training.draws import batch_indices, generator_for, spread_timesteps
from lora_pipeline.training.objective import NoiseSchedule, denoising_loss, prior_weights, schedule_of
from lora_pipeline.training.phases import phases_of

BATCH, STEPS = 6, 10


def schedule(prediction: str) -> NoiseSchedule:
    cumulated = torch.linspace(0.99, 0.0, STEPS)
    config = SimpleNamespace(prediction_type=prediction)
    return schedule_of(SimpleNamespace(config=config, alphas_cumprod=cumulated))


def draws() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(BATCH, 4, 3, 3, generator=generator),
        "noise": torch.randn(BATCH, 4, 3, 3, generator=generator),
        "conditioning": torch.randn(BATCH, 2, 5, generator=generator),
        "timesteps": torch.tensor([0, 2, 4, 6, 8, 9]),
    }


def angles(timesteps: Tensor) -> Tensor:
    """With signal = cos φ and noise = sin φ, v is the derivative of x_t by φ (arXiv:2202.00512, appendix D)."""
    return torch.acos(torch.linspace(0.99, 0.0, STEPS).double().sqrt())[timesteps].view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_who_knows_the_answer_loses_nothing(prediction: str) -> None:
    given = draws()
    x, noise = given["latents"].double(), given["noise"].double()

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        del conditioning
        angle = angles(timesteps)
        torch.testing.assert_close(noisy.double(), angle.cos() * x + angle.sin() * noise, atol=1e-6, rtol=0)
        step = 1e-6
        ahead, behind = ((angle + d).cos() * x + (angle + d).sin() * noise for d in (step, -step))
        return {"epsilon": noise, "sample": x, "v_prediction": (ahead - behind) / (2 * step)}[prediction].float()

    losses = denoising_loss(predict, schedule(prediction), **given, weights=torch.ones(BATCH))
    torch.testing.assert_close(losses, torch.zeros(BATCH), atol=1e-9, rtol=0)


def test_weights_make_the_sum_of_two_means() -> None:
    given = draws()
    loss: Callable[[Tensor], Tensor] = lambda weights: denoising_loss(  # noqa: E731
        lambda noisy, _, __: noisy * 0, schedule("epsilon"), **given, weights=weights
    )
    alone = given["noise"].square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss(torch.ones(BATCH)), alone)
    together = loss(prior_weights(4, 2, 0.3)).sum()
    torch.testing.assert_close(together, alone[:4].mean() + 0.3 * alone[4:].mean())
    assert prior_weights(2, 0, 1.0).tolist() == [0.5, 0.5]


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


def test_timesteps_are_uniform_and_spread() -> None:
    drawn = torch.stack([spread_timesteps(4, 100, generator_for(0, "a", step, "t")) for step in range(2000)])
    assert drawn.min() == 0
    assert drawn.max() == 99
    for column in drawn.T:  # a uniform share of each quarter: 500 ± 4 standard errors
        assert (torch.bincount(column // 25, minlength=4) - 500).abs().max() < 80
    assert all(sorted((row // 25).tolist()) == [0, 1, 2, 3] for row in drawn)


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
