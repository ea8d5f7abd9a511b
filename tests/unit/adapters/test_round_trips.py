"""What every writer is for: any adapter it takes comes back the same, to the last bit and alpha."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import load, save
from lora_pipeline.adapters.lora import LoraFactors

UNET = ["conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"]
UNET += ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", "add_embedding.linear_1"]
CLIP = [f"text_model.encoder.layers.{layer}.{name}" for layer in (0, 1, 10) for name in ("mlp.fc1", "self_attn.q_proj")]
TARGETS = [f"unet.{path}" for path in UNET] + [
    f"{model}.{path}" for model in ("text_encoder", "text_encoder_2") for path in CLIP
]
TARGETS += ["text_encoder_2.text_model.text_projection"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).filter(lambda token: token == token.strip())


@st.composite
def factors(draw: st.DrawFn) -> LoraFactors:
    rank, inputs, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    dtype, source = draw(st.sampled_from(DTYPES)), torch.Generator().manual_seed(draw(st.integers(0, 9)))
    down = torch.randn(rank, inputs, *kernel, generator=source).to(dtype)
    up = torch.randn(outputs, rank, *[1 for _ in kernel], generator=source).to(dtype)
    return LoraFactors(down, up, draw(st.floats(allow_nan=False, allow_infinity=False)))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    rows = st.integers(1, 3).map(lambda count: torch.arange(2.0 * count).reshape(count, 2))
    parts = draw(st.dictionaries(st.sampled_from(TARGETS), factors(), max_size=6))
    doras = {model for model in ("unet.", "text_encoder.", "text_encoder_2.") if draw(st.booleans())}
    texts = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), st.text(max_size=3), max_size=2)
    return Adapter(
        parts,
        draw(st.dictionaries(TOKENS, rows, max_size=2)),
        draw(st.fixed_dictionaries({}, optional={"base": st.text(max_size=3), "source_metadata": texts})),
        embeddings_2=draw(st.dictionaries(TOKENS, rows, max_size=2)),
        magnitudes={
            target: torch.rand(each.up.shape[0], *[1] * (each.up.ndim - 1))
            for target, each in parts.items()
            if target.startswith(tuple(doras))
        },
    )


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("form", ["native", "diffusers", "peft"])
@settings(max_examples=40)
@given(adapter=adapters())
def test_an_adapter_comes_back_as_it_was(form: str, adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(adapter, Path(folder) / "x", form)
        again = load(Path(folder) / "x")
    assert again.factors.keys() == adapter.factors.keys()
    for target, each in adapter.factors.items():
        assert again.factors[target].alpha == each.alpha
        assert same(again.factors[target].down, each.down)
        assert same(again.factors[target].up, each.up)
    for kind in ("embeddings", "embeddings_2", "magnitudes"):
        assert getattr(again, kind).keys() == getattr(adapter, kind).keys()
        assert all(same(tensor, getattr(again, kind)[name]) for name, tensor in getattr(adapter, kind).items())
    assert again.provenance == adapter.provenance
