"""The objective against diffusers, and its parts in whole runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from train_values import train_params

from lora_pipeline.errors import ParamsError
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.training.batches import Batch, Sampler
from lora_pipeline.training.cache import TensorCache
from lora_pipeline.training.conditioning import cached, live
from lora_pipeline.training.encodings import Encoder, anchors_of
from lora_pipeline.training.loop import LossAt
from lora_pipeline.training.losses import BRANCH, base_prediction, batch_loss, loss_of
from lora_pipeline.training.noising import noised, schedule_of, target_of
from lora_pipeline.training.objective import objective_of
from lora_pipeline.training.phases import TUNING, phases_of
from lora_pipeline.training.tuning import Task, Tuned, tune
from lora_pipeline.training.weighting import level_weights

pytestmark = pytest.mark.filterwarnings("default::FutureWarning")
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def run(folder: Path, task: Task, name: str) -> Tuned:
    (folder / name).mkdir()
    return tune(tiny.components(folder / "tokenizer"), task, folder / name, lambda _, __: None)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_and_noise_are_those_of_diffusers(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 2, 2, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 400, 998, 999])
    given = schedule_of(scheduler)
    torch.testing.assert_close(noised(given, latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps))
    target = {"epsilon": noise, "sample": latents, "v_prediction": scheduler.get_velocity(latents, noise, timesteps)}
    torch.testing.assert_close(target_of(given, latents, noise, timesteps), target[prediction])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_that_of_diffusers_examples(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear", beta_end=0.012)
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    least = torch.stack([snr, torch.full_like(snr, 5.0)]).min(dim=0).values
    expected = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[prediction]
    found = level_weights(schedule_of(scheduler), "min_snr", 5.0)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    debiased = level_weights(schedule_of(scheduler), "debiased", 5.0)
    assert debiased is not None
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    torch.testing.assert_close(debiased.double(), snr.sqrt() / divisor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_zero_terminal_snr_is_that_of_diffusers_and_is_not_done_twice(kind: Any) -> None:
    options = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    rescaled = schedule_of(kind(**options, rescale_betas_zero_snr=True))
    found = schedule_of(kind(**options), zero_terminal_snr=True)
    assert found.signal[-1] == 0.0
    assert found.noise[-1] == 1.0
    torch.testing.assert_close(found.signal, rescaled.signal, rtol=0, atol=2e-5)
    again = schedule_of(kind(**options, rescale_betas_zero_snr=True), zero_terminal_snr=True)
    assert torch.equal(again.signal, rescaled.signal)
    assert not torch.equal(schedule_of(kind(**options)).signal, rescaled.signal)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"objective.zero_terminal_snr": True}, "objective.zero_terminal_snr"),
        ({"objective.weighting": "debiased"}, "objective.weighting"),
    ],
)
def test_bases_that_predict_noise_are_not_asked_for_it_where_there_is_nothing_else(
    tmp_path: Path, changes: Mapping[str, Any], where: str
) -> None:
    base = tiny.components(tmp_path / "tokenizer", "epsilon")
    with pytest.raises(ParamsError) as caught:
        tune(base, tiny.task(tmp_path, changes), tmp_path / "work", lambda _, __: None)
    assert caught.value.where == f"concepts.zorp.train.{where}"
    assert not (tmp_path / "work").exists()  # not a step was taken


SWITCHES: list[dict[str, Any]] = [
    {"objective.loss": "huber"},
    {"objective.weighting": "min_snr"},
    {"objective.weighting": "debiased"},
    {"objective.timesteps": "logit_normal"},
    {"tuning.timesteps": [0.0, 0.5]},
    {"objective.offset_noise": 0.1},
    {"objective.pyramid_noise": 0.3},
    {"objective.input_perturbation": 0.1},
    {"objective.mask_background": 0.1},
    {"prior.target": "prediction"},
]


@pytest.mark.parametrize("changes", SWITCHES, ids=lambda changes: "-".join(changes))
def test_every_switch_reaches_the_training(tmp_path: Path, changes: dict[str, Any]) -> None:
    task = tiny.with_masks(tiny.task(tmp_path, {"method": "lora"}))
    plain = run(tmp_path, task, "plain")
    params = train_params({"method": "lora", **changes})
    changed = run(tmp_path, dataclasses.replace(task, params=params), "changed")
    assert plain.losses[0].loss != changed.losses[0].loss
    assert any(not torch.equal(plain.factors[name].up, changed.factors[name].up) for name in plain.factors)


def test_a_window_of_a_phase_is_its_own(tmp_path: Path) -> None:
    task = tiny.task(tmp_path)
    plain = run(tmp_path, task, "plain").losses
    params = train_params({"tuning.timesteps": [0.5, 1.0]})
    changed = run(tmp_path, dataclasses.replace(task, params=params), "changed").losses
    assert [a == b for a, b in zip(plain, changed, strict=True)] == [True] * 3 + [False] * 4


class Bench:
    """A loss of the tuning phase, step by step, without a run around it."""

    def __init__(self, folder: Path, changes: Mapping[str, Any], with_priors: bool) -> None:
        self.base: Components = tiny.components(folder / "tokenizer")
        self.task = tiny.with_masks(tiny.task(folder, {"method": "dreambooth", **changes}))
        cache, background = TensorCache(None), self.task.params.objective.mask_background
        own = Encoder(self.base.vae, cache, print, background).examples(self.task.examples)
        of_class = Encoder(self.base.vae, cache, print).examples(self.task.priors)
        priors = of_class if with_priors else anchors_of(own, "<zorp>")
        [phase] = phases_of(self.task.params)
        assert phase.name == TUNING
        self.objective = objective_of(self.task.params, phase, self.base.scheduler)
        self.sampler = Sampler(phase, (own, priors), 2, self.objective, 7)
        self.condition = cached(self.base, [each.caption for each in (*own, *priors)], cache)

    def loss(self, anchored: bool) -> LossAt:
        anchor = base_prediction(self.base, self.condition) if anchored else None
        return loss_of(batch_loss(self.base, self.objective, self.condition, anchor), self.sampler)

    def batch(self, step: int) -> Batch:
        [batch] = self.sampler.batches(step)
        return batch


def test_the_loss_of_a_step_is_what_its_batch_says(tmp_path: Path) -> None:
    """All of it at once, written out for one example at a time with diffusers' scheduler."""
    bench = Bench(
        tmp_path,
        {
            "objective.weighting": "min_snr", "objective.loss": "huber", "objective.mask_background": 0.2,
            "objective.input_perturbation": 0.3, "objective.offset_noise": 0.1, "prior.weight": 0.7,
        },
        with_priors=True,
    )  # fmt: skip
    scheduler, total = bench.base.scheduler, torch.zeros(())
    batch = bench.batch(1)
    with torch.no_grad():
        for i in range(4):
            x, noise, shown, at = (
                each[i : i + 1] for each in (batch.latents, batch.noise, batch.shown, batch.timesteps)
            )
            states = encode_prompts(bench.base, [batch.captions[i]]).states
            said = bench.base.unet(scheduler.add_noise(x, shown, at), at, states).sample
            error = said - scheduler.get_velocity(x, noise, at)
            cost = 2 * 0.1**2 * ((1 + (error / 0.1) ** 2).sqrt() - 1)
            if batch.pixel_weights is not None:
                cost = cost * batch.pixel_weights[i]
            cumulated = scheduler.alphas_cumprod[at]
            snr = cumulated / (1 - cumulated)
            total += (0.5 if i < 2 else 0.35) * (snr.clamp(max=5.0) / (snr + 1)).squeeze() * cost.mean()
        assert batch.pixel_weights is not None
        assert batch.pixel_weights.std() > 0.1
        torch.testing.assert_close(bench.loss(anchored=False)(1), total, rtol=1e-4, atol=1e-6)


def test_nothing_but_the_own_half_is_lost_before_anything_is_learnt(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {}, with_priors=False)
    batch = bench.batch(0)
    assert batch.captions[2:] == ["a creature"] * 2
    with torch.no_grad():
        states = encode_prompts(bench.base, batch.captions).states
        said = bench.base.unet(
            bench.base.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps), batch.timesteps, states
        ).sample
        target = bench.base.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        own = (said - target)[:2].square().mean()
        torch.testing.assert_close(bench.loss(anchored=True)(0), own, rtol=1e-5, atol=1e-7)


def test_the_base_is_asked_with_all_that_is_learnt_switched_off(tmp_path: Path) -> None:
    """The text encoder's adapter too, which a caption cached before would not show."""
    from lora_pipeline.injection import inject

    base = tiny.components(tmp_path / "tokenizer")
    source = torch.Generator().manual_seed(0)
    noisy, at = torch.randn(2, 4, 4, 4, generator=source), torch.tensor([10, 900])
    captions = ["a creature", ""]
    with torch.no_grad():
        truth: Tensor = base.unet(noisy, at, encode_prompts(base, captions).states).sample
    for model, prefix, globs in ((base.unet, "unet", ["*attn*.to_?"]), (base.text_encoder, "text_encoder", ["*fc1"])):
        targets = inject.select_targets(model, prefix, globs)
        inject.inject_new(model, prefix, targets, BRANCH, rank=2, alpha=2.0, generator=source)
        for name, parameter in inject.trainable(model).items():
            if name.endswith("up"):
                torch.nn.init.normal_(parameter, generator=source)
    with torch.no_grad():
        learnt: Tensor = base.unet(noisy, at, encode_prompts(base, captions).states).sample
    said = base_prediction(base, live(base))(noisy, at, captions, None)
    assert not said.requires_grad
    torch.testing.assert_close(said, truth)
    assert not torch.allclose(learnt, truth, rtol=1e-2)
    with torch.no_grad():  # and is switched on again
        torch.testing.assert_close(base.unet(noisy, at, encode_prompts(base, captions).states).sample, learnt)


def test_priors_need_no_pictures_where_the_base_says_what_is_right(tmp_path: Path) -> None:
    changes = {"method": "dreambooth", "prior.target": "prediction", "tuning.steps": 30, "prior.weight": 30.0}
    task = dataclasses.replace(tiny.task(tmp_path, changes), priors=())
    held = run(tmp_path, task, "held")
    free = run(tmp_path, dataclasses.replace(task, params=train_params({**changes, "prior.weight": 0.0})), "free")
    size = {
        name: sum(float(each.delta().norm()) ** 2 for each in tuned.factors.values())
        for name, tuned in (("held", held), ("free", free))
    }
    assert size["held"] < size["free"]  # what the base says pulls back to the base
