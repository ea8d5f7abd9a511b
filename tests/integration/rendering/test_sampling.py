from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_pipeline.errors import MissingError, ParamsError
from lora_pipeline.pretrained.components import SCHEDULERS, Components
from lora_pipeline.pretrained.samplers import SAMPLERS, sampler_of
from lora_pipeline.rendering.sampling import initial_latents, picture_generator, sample
from lora_pipeline.rendering.weighting import Weighting

PROMPTS, SEEDS = ["a creature", "a dog", "a dog"], [1, 2, 3]


def drawn(components: Components, prompts: list[str] = PROMPTS, seeds: list[int] = SEEDS, **changes: Any) -> np.ndarray:
    options = {"steps": 4, "guidance_scale": 3.0, "negative_prompt": "", "weighting": None, "batch": 3}
    return sample(components, prompts, seeds, **(options | changes))  # type: ignore[arg-type]  # values of many kinds


def parts(components: Components) -> dict[str, Any]:
    return {name: getattr(components, name) for name in ("tokenizer", "text_encoder", "vae", "unet", "scheduler")}


def diffusers_draws(
    components: Components, guidance_scale: float, negative_prompt: str, rescale: float = 0.0, eta: float = 0.0
) -> np.ndarray:
    pipeline = StableDiffusionPipeline(
        **parts(components), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS,
        latents=initial_latents(components, SEEDS),
        generator=[picture_generator(seed, "steps") for seed in SEEDS],
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        guidance_rescale=rescale,
        eta=eta,
        negative_prompt=[negative_prompt] * len(PROMPTS),
        output_type="np",
    ).images
    return np.asarray(images)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' set_timesteps
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("guidance_scale", "negative_prompt"), [(1.0, ""), (3.0, "a dog")])
def test_pictures_are_those_of_diffusers(
    components: Components, name: str, guidance_scale: float, negative_prompt: str
) -> None:
    options = {"DDIMScheduler": {"clip_sample": False}, "DDPMScheduler": {"clip_sample": False},
               "PNDMScheduler": {"skip_prk_steps": True}}  # fmt: skip
    scheduler = getattr(diffusers, name)(prediction_type="v_prediction", steps_offset=1, **options.get(name, {}))
    components = replace(components, scheduler=scheduler)
    theirs = diffusers_draws(components, guidance_scale, negative_prompt)
    ours = drawn(components, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    assert theirs.std() > 0.01
    np.testing.assert_allclose(ours / 255, theirs, rtol=1e-3, atol=0.51 / 255)  # ours are rounded to bytes


OWN = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 1}


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # in diffusers' set_timesteps
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "DPMSolverSDE"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_every_sampler_draws_on_the_bases_schedule_what_diffusers_draws(
    components: Components, name: str, rescale: float
) -> None:
    base = diffusers.DDIMScheduler(beta_start=0.001, beta_end=0.015, clip_sample=False, **OWN)
    options = {"use_karras_sigmas": True} if name == "EulerDiscrete" else {}
    components = replace(components, scheduler=sampler_of(base, name, options))
    assert components.scheduler.config.beta_end == 0.015
    assert components.scheduler.config.prediction_type == "v_prediction"
    eta = 0.3 if name == "TCD" else 0.0  # the class's own, in place of which diffusers' pipeline has 0
    theirs = diffusers_draws(components, 3.0, "a dog", rescale, eta)
    ours = drawn(components, guidance_scale=3.0, negative_prompt="a dog", guidance_rescale=rescale)
    np.testing.assert_allclose(ours / 255, theirs, rtol=1e-3, atol=0.51 / 255)


@pytest.mark.parametrize(
    ("name", "options", "where", "said"),
    [
        ("Euler", {}, "sampler", "there is no 'Euler'"),
        ("DDIM", {"karras": True}, "sampler_options", "has no 'karras'"),
        (None, {"eta": 0.5}, "sampler_options", "DDIMScheduler has no 'eta'"),
        ("DEISMultistep", {"solver_type": "magic"}, "sampler_options", "refuses them"),
    ],
)  # fmt: skip
def test_a_sampler_that_cannot_be_is_refused(name: str | None, options: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(ParamsError, match=said) as refusal:
        sampler_of(diffusers.DDIMScheduler(), name, options)
    assert refusal.value.where == where


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("DPMSolverSDEScheduler requires the torchsde library but it was not found")

    monkeypatch.setattr(diffusers.DPMSolverSDEScheduler, "from_config", refuse)
    with pytest.raises(MissingError, match="needs torchsde") as refusal:
        sampler_of(diffusers.DDIMScheduler(), "DPMSolverSDE", {})
    assert refusal.value.fix == "pip install torchsde"


def test_without_a_name_the_base_keeps_its_own() -> None:
    own = diffusers.DDIMScheduler()
    assert sampler_of(own, None, {}) is own
    assert sampler_of(own, None, {"timestep_spacing": "trailing"}).config.timestep_spacing == "trailing"


def test_the_same_seed_draws_the_same_picture(components: Components) -> None:
    first, again, other = drawn(components, ["a dog"] * 3, [5, 5, 6])
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_picture_does_not_depend_on_its_neighbours(components: Components) -> None:
    together = drawn(components)
    swapped = drawn(components, ["a dog", "a dog", "a creature"], [9, 2, 1])
    np.testing.assert_array_equal(together[1], swapped[1])


def test_pictures_come_in_order_whatever_the_batch(components: Components) -> None:
    done: list[int] = []
    apart = drawn(components, batch=2, advance=done.append)
    assert np.abs(apart.astype(int) - drawn(components).astype(int)).max() <= 1
    assert done == [2, 3]


def test_every_batch_goes_through_all_steps_and_their_rows(components: Components) -> None:
    used: list[int] = []
    steps = [[(0, 0)], [(1, 0), (2, 0)], [(1, 0)], [(0, 0)]]
    drawn(components, batch=2, weighting=Weighting(steps, used.append, lambda _: None))
    assert used == [0, 1, 2, 1, 0] * 2


def test_without_prompts_there_are_no_pictures_of_the_right_size(components: Components) -> None:
    assert drawn(components, [], []).shape == (0, 8, 8, 3)


def test_the_base_is_left_as_it_was(components: Components) -> None:
    before = dict(components.scheduler.__dict__)
    state = torch.random.get_rng_state()
    drawn(components)
    assert components.scheduler.num_inference_steps is before["num_inference_steps"]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range_are_refused(components: Components, steps: int) -> None:
    with pytest.raises(ParamsError, match=str(steps)):
        drawn(components, steps=steps)


def test_a_picture_that_overflows_is_refused(components: Components) -> None:
    def explode(_: int) -> None:
        components.unet.conv_out.weight.data.fill_(float("inf"))

    with pytest.raises(ParamsError, match="overflow"):
        drawn(components, weighting=Weighting([[(0, 0)]] * 4, explode, lambda _: None))
