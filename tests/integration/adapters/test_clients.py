"""diffusers itself as the client of what we write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import save
from lora_pipeline.adapters.merging import merge
from lora_pipeline.injection.inject import inject_adapter, set_weights
from lora_pipeline.injection.tokens import add_placeholder, expand, initial_rows, remove

Load = Callable[..., Any]
Make = Callable[..., Adapter]


def predictions(pipeline: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """What the text encoder and the UNet say."""
    source = torch.Generator().manual_seed(1)
    padding = {"padding": "max_length", "max_length": 24, "truncation": True, "return_tensors": "pt"}
    ids = pipeline.tokenizer(expand(pipeline.tokenizer, prompt), **padding).input_ids
    latents = torch.randn(1, 4, 8, 8, generator=source)
    with torch.no_grad():
        encoded = pipeline.text_encoder(ids).last_hidden_state
        return encoded, pipeline.unet(latents, 500, encoded).sample


def with_adapter(pipeline: Any, adapter: Adapter, weight: float = 1.0) -> Any:
    for prefix in ("unet", "text_encoder"):
        inject_adapter(getattr(pipeline, prefix), prefix, adapter, "a")
        set_weights(getattr(pipeline, prefix), {"a": weight})
    for token, rows in adapter.embeddings.items():
        add_placeholder(pipeline.tokenizer, pipeline.text_encoder, token, rows)
    return pipeline


def assert_same_predictions(one: Any, other: Any, prompt: str) -> None:
    for mine, theirs in zip(predictions(one, prompt), predictions(other, prompt), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_diffusers_loads_our_file_and_says_the_same(tmp_path: Path, pipeline: Load, make_adapter: Make) -> None:
    adapter = make_adapter(1, {"<zorp>": 2})
    save(adapter, tmp_path / "pytorch_lora_weights.safetensors", "diffusers")
    theirs = pipeline()
    theirs.load_lora_weights(tmp_path)
    for token, rows in adapter.embeddings.items():
        add_placeholder(theirs.tokenizer, theirs.text_encoder, token, rows)
    ours = with_adapter(pipeline(), adapter)
    assert_same_predictions(ours, theirs, "a <zorp> creature")
    plain = predictions(pipeline(), "a creature")[1]
    assert not torch.allclose(predictions(ours, "a creature")[1], plain, rtol=1e-2)


def test_we_load_what_diffusers_saves(tmp_path: Path, pipeline: Load) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    theirs = pipeline()
    theirs.unet.add_adapter(
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["to_q", "to_v"],
            alpha_pattern={"attn2.to_q": 2},
            rank_pattern={"to_v": 2},
        )
    )
    theirs.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"]))
    source = torch.Generator().manual_seed(3)
    models = {"unet": theirs.unet, "text_encoder": theirs.text_encoder}
    for model in models.values():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=source)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(theirs.text_encoder),
        **_collate_lora_metadata(models),
    )
    adapter = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert {factors.alpha for factors in adapter.factors.values()} == {2.0, 3.0, 5.0}
    assert_same_predictions(with_adapter(pipeline(), adapter), theirs, "a creature")


def as_vocabulary_and_merges(base: Path) -> None:
    """Rewrites the tokenizer the way Stable Diffusion 1.5 ships it."""
    import json

    tokenizer = base / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (tokenizer / "tokenizer.json").unlink()


@pytest.mark.parametrize("fast", [True, False])
def test_a_merged_folder_needs_nothing_of_ours(
    tmp_path: Path, base: Path, pipeline: Load, make_adapter: Make, fast: bool
) -> None:
    source = tmp_path / "source"
    shutil.copytree(base, source)
    if not fast:
        as_vocabulary_and_merges(source)
    adapter = make_adapter(1, {"<zorp>": 2, "<blue>": 1})
    merge(source, [("a", adapter, 0.7)], tmp_path / "merged", None)
    merged, ours = pipeline(tmp_path / "merged"), with_adapter(pipeline(source), adapter, 0.7)
    assert_same_predictions(ours, merged, "a <zorp> creature on <Blue>")
    settings = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "np"}
    prompt = "a <zorp> creature"
    assert merged.maybe_convert_prompt(prompt, merged.tokenizer) == expand(ours.tokenizer, prompt)
    pictures = [each(prompt, generator=torch.Generator().manual_seed(0), **settings).images for each in (merged, ours)]
    torch.testing.assert_close(torch.from_numpy(pictures[0]), torch.from_numpy(pictures[1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_merged_folder_loads_in_its_dtype(
    tmp_path: Path, base: Path, pipeline: Load, make_adapter: Make, dtype: str
) -> None:
    merge(base, [("a", make_adapter(1), 1.0)], tmp_path / "merged", dtype)
    assert pipeline(tmp_path / "merged").text_encoder.dtype == getattr(torch, dtype)


def test_placeholders_in_a_real_tokenizer_and_text_encoder(pipeline: Load) -> None:
    loaded = pipeline()
    before = predictions(loaded, "a creature")[0]
    original = loaded.text_encoder.get_input_embeddings()
    rows = initial_rows(loaded.tokenizer, loaded.text_encoder, "creature", 2)
    embedding = add_placeholder(loaded.tokenizer, loaded.text_encoder, "<zorp>", rows)
    ids = loaded.tokenizer(expand(loaded.tokenizer, "a <zorp> a"), add_special_tokens=False).input_ids
    first = original.num_embeddings
    assert ids[1:3] == [first, first + 1]
    assert torch.equal(embedding(torch.tensor(ids))[1:3], rows)
    assert torch.equal(predictions(loaded, "a creature")[0], before)
    remove(loaded.text_encoder)
    assert loaded.text_encoder.get_input_embeddings() is original
