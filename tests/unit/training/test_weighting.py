"""Weights of noise levels against what they mean for the picture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_pipeline.errors import ParamsError
from lora_pipeline.training.noising import NoiseSchedule, noised, schedule_of, target_of, without_last_signal
from lora_pipeline.training.weighting import level_weights

GAMMA = 5.0


def schedule(prediction: str, last: float = 0.004) -> NoiseSchedule:
    config = SimpleNamespace(prediction_type=prediction)
    return schedule_of(SimpleNamespace(config=config, alphas_cumprod=torch.linspace(0.999, last, 50)))


def answer(given: NoiseSchedule, x: torch.Tensor, noisy: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """What a UNet of this prediction type says if it takes the picture for `x`."""
    signal, spread = (each[at].double().view(-1, 1, 1, 1) for each in (given.signal, given.noise))
    noise = (noisy - signal * x) / spread
    return {"epsilon": noise, "sample": x, "v_prediction": signal * noise - spread * x}[given.prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_one_error_of_the_picture_counts_the_same_however_it_is_predicted(prediction: str, weighting: str) -> None:
    given, source = schedule(prediction), torch.Generator().manual_seed(0)
    at = torch.arange(50)
    x, noise, wrong = (torch.randn(50, 4, 2, 2, generator=source).double() for _ in range(3))
    noisy = noised(given, x, noise, at)
    weights = level_weights(given, weighting, GAMMA)
    assert weights is not None
    distance = (answer(given, wrong, noisy, at) - target_of(given, x, noise, at)).square().mean(dim=(1, 2, 3))
    snr = given.signal.double() ** 2 / given.noise.double() ** 2
    expected = {"min_snr": snr.clamp(max=GAMMA), "debiased": snr.sqrt()}[weighting]
    of_picture = (wrong - x).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weights * distance, expected * of_picture, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_levels_all_of_noise_or_all_of_picture_have_finite_weights(prediction: str) -> None:
    given = schedule(prediction, last=0.0)
    weights = level_weights(given, "min_snr", GAMMA)
    assert weights is not None
    assert weights[-1].item() == {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}[prediction]
    clean = NoiseSchedule(torch.ones(1), torch.zeros(1), prediction)
    limit = level_weights(clean, "min_snr", GAMMA)
    assert limit is not None
    assert limit.item() == {"epsilon": 0.0, "v_prediction": 0.0, "sample": GAMMA}[prediction]


def test_plain_weights_are_none_and_infinite_ones_are_refused() -> None:
    assert level_weights(schedule("epsilon"), "plain", GAMMA) is None
    with pytest.raises(ParamsError, match=r"objective\.weighting: debiased has an infinite weight for epsilon"):
        level_weights(schedule("epsilon", last=0.0), "debiased", GAMMA)


def test_rescaling_keeps_the_first_level_ends_at_nothing_and_keeps_proportions() -> None:
    before = torch.linspace(0.999, 0.0047, 50).double()
    after = without_last_signal(before)
    assert after[0].item() == pytest.approx(0.999)
    assert after[-1].item() == 0.0
    old, new = before.sqrt(), after.sqrt()
    ratio = (new[:-1] - new[1:]) / (old[:-1] - old[1:])
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
