"""Every kind of base draws what diffusers' own pipeline for it draws, and adapters act in all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import save
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import CorruptError, PipelineError
from lora_pipeline.injection.inject import collect, inject_new, remove, select_targets, trainable
from lora_pipeline.pretrained.adapted import add_adapter, strip
from lora_pipeline.pretrained.components import KINDS, Components, load_components
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.pretrained.inpainting import channels_given, nothing_given
from lora_pipeline.rendering.sampling import initial_latents, picture_generator, sample

PROMPTS, SEEDS = ["a creature", "a dog"], [1, 2]
PIPELINES = dict(zip(tiny.KINDS, ("", "", "Inpaint", "XL", "XLInpaint"), strict=True))


@pytest.fixture(params=tiny.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def base_of(folder: Path, kind: str) -> Components:
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    made: Components = replace(tiny.components(folder / "tokenizer", kind=kind), scheduler=scheduler)
    return made


def pipeline_of(components: Components, kind: str) -> Any:
    parts = {name: part for name, part in vars(components).items() if part is not None and name != "empty_is_zero"}
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if components.text_encoder_2 is not None:
        options = {"force_zeros_for_empty_prompt": components.empty_is_zero, "add_watermarker": False}
    pipeline = getattr(diffusers, f"StableDiffusion{PIPELINES[kind]}Pipeline")(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_draws(pipeline: Any, components: Components, prompts: list[str], negative: str | None) -> np.ndarray:
    latents = initial_latents(components, SEEDS)
    given: dict[str, Any] = {}
    if channels_given(components.unet, components.vae):
        blank = nothing_given(components.vae, latents)
        hole, picture = torch.ones(2, 1, 8, 8), torch.zeros(2, 3, 8, 8)
        given = {"image": picture, "mask_image": hole, "masked_image_latents": blank[:, 1:], "strength": 1.0}
    images = pipeline(
        prompts, latents=latents, generator=[picture_generator(seed, "steps") for seed in SEEDS],
        num_inference_steps=4, guidance_scale=3.0, height=8, width=8, output_type="np",
        negative_prompt=None if negative is None else [negative] * 2, **given,
    ).images  # fmt: skip
    return np.asarray(images)


def drawn(components: Components, prompts: list[str], negative: str = "") -> np.ndarray:
    return sample(
        components, prompts, SEEDS, steps=4, guidance_scale=3.0, negative_prompt=negative, weighting=None, batch=2
    )


def adapter_of(components: Components) -> Adapter:
    """Random factors for all models, and rows for all text encoders."""
    source = torch.Generator().manual_seed(1)
    factors: dict[str, LoraFactors] = {}
    for prefix, model in components.models.items():
        globs = ["*attn*.to_?"] if prefix == "unet" else ["*_proj"]
        inject_new(model, prefix, select_targets(model, prefix, globs), "new", rank=2, alpha=2.0, generator=source)
        for parameter in trainable(model).values():
            parameter.data = torch.randn(parameter.shape, generator=source)
        factors |= collect(model, prefix, "new")
        remove(model)
    rows = [{"<zorp>": torch.randn(2, encoder.config.hidden_size, generator=source)}
            for _, encoder in components.readers.values()]  # fmt: skip
    return Adapter(factors, rows[0], {"params": {}}, embeddings_2=rows[1] if len(rows) > 1 else {})


@pytest.mark.parametrize("negative", [None, "a dog"])
def test_pictures_are_those_of_diffusers(tmp_path: Path, kind: str, negative: str | None) -> None:
    components = base_of(tmp_path, kind)
    theirs = diffusers_draws(pipeline_of(components, kind), components, PROMPTS, negative)
    assert theirs.std() > 0.01
    np.testing.assert_allclose(drawn(components, PROMPTS, negative or "") / 255, theirs, rtol=1e-3, atol=0.51 / 255)


def test_a_folder_of_diffusers_is_loaded_as_it_is(tmp_path: Path, kind: str) -> None:
    components = base_of(tmp_path, kind)
    pipeline_of(components, kind).save_pretrained(tmp_path / "base")
    loaded = load_components(tmp_path / "base")
    assert loaded.empty_is_zero == components.empty_is_zero
    np.testing.assert_array_equal(drawn(loaded, PROMPTS), drawn(components, PROMPTS))


def test_every_family_is_named_where_a_base_is_of_none(tmp_path: Path) -> None:
    pipeline_of(base_of(tmp_path, "sd1"), "sd1").save_pretrained(tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(index.read_text("utf-8").replace("StableDiffusionPipeline", "FluxPipeline"), "utf-8")
    with pytest.raises(CorruptError) as refusal:
        load_components(tmp_path / "base")
    assert all(known in refusal.value.problem for known in ("FluxPipeline", *KINDS))


def test_a_base_that_reads_depth_is_refused(tmp_path: Path) -> None:
    components = base_of(tmp_path, "sd1")
    components.unet.register_to_config(in_channels=5)
    with pytest.raises(CorruptError, match="reads 5 channels, and latents have 4"):
        drawn(components, PROMPTS)


def test_an_adapter_acts_in_every_model_and_leaves_without_a_trace(tmp_path: Path, kind: str) -> None:
    components = base_of(tmp_path, kind)
    before, adapter = drawn(components, PROMPTS), adapter_of(components)
    seen = []
    for prefix in components.models:
        mine = components.with_own_tokenizers()
        own = {target: each for target, each in adapter.factors.items() if target.startswith(f"{prefix}.")}
        add_adapter(mine, Adapter(own), "one")
        seen.append(drawn(mine, PROMPTS))
        strip(mine)
    assert all((each != before).any() for each in seen)
    mine = components.with_own_tokenizers()
    add_adapter(mine, adapter, "whole")
    assert (drawn(mine, ["a <zorp> creature", "a <zorp>"]) != drawn(mine, PROMPTS)).any()
    strip(mine)
    np.testing.assert_array_equal(drawn(components, PROMPTS), before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_an_adapter_of_sdxl_draws_in_diffusers_what_it_draws_here(tmp_path: Path) -> None:
    adapter, prompts = adapter_of(base_of(tmp_path / "one", "xl")), ["a <zorp> creature", "a dog"]
    save(replace(adapter, embeddings={}, embeddings_2={}), tmp_path / "adapter.safetensors", "diffusers")
    components = base_of(tmp_path / "theirs", "xl")
    pipeline = pipeline_of(components, "xl")
    for ending, rows in (("", adapter.embeddings), ("_2", adapter.embeddings_2)):
        pipeline.load_textual_inversion(
            dict(rows), token="<zorp>", text_encoder=getattr(pipeline, f"text_encoder{ending}"),
            tokenizer=getattr(pipeline, f"tokenizer{ending}"),
        )  # fmt: skip
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id  # or it pools the placeholder
    pipeline.load_lora_weights(str(tmp_path / "adapter.safetensors"))
    theirs = diffusers_draws(pipeline, components, prompts, None)
    mine = base_of(tmp_path / "mine", "xl")
    add_adapter(mine, adapter, "adapter")
    np.testing.assert_allclose(drawn(mine, prompts) / 255, theirs, rtol=1e-3, atol=0.51 / 255)


def test_a_placeholder_is_not_taken_for_the_end_of_a_prompt(tmp_path: Path) -> None:
    components = base_of(tmp_path, "xl")
    add_adapter(components, replace(adapter_of(components), factors={}), "token")
    with torch.no_grad():
        one, other = encode_prompts(components, ["a <zorp> dog", "a <zorp> creature"]).tensors()["pooled"]
    assert not torch.allclose(one, other)  # both would be what stands at <zorp>


@pytest.mark.parametrize(("of", "on"), [("xl", "sd1"), ("sd1", "xl")])
@pytest.mark.parametrize("left", ["factors", "embeddings", "both"])
def test_an_adapter_of_another_family_is_refused(tmp_path: Path, of: str, on: str, left: str) -> None:
    adapter = adapter_of(base_of(tmp_path / of, of))
    if left != "both":
        changes: dict[str, Any] = {"embeddings": {}, "embeddings_2": {}} if left == "factors" else {"factors": {}}
        adapter = replace(adapter, **changes)
    with pytest.raises(PipelineError):
        add_adapter(base_of(tmp_path / on, on), adapter, "other")
