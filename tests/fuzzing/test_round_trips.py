"""Any adapter a writer takes comes back the same, to the last bit; all else is refused, and never crashes."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import READERS, WRITERS, load, save
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import CorruptError

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


WORDS = [
    "unet", "text_encoder", "base_model.model", "conv_in", "to_q", "to_out", "processor", "lora_A", "lora_B", "lora",
    "down", "up", "weight", "alpha", "default", "lora_magnitude_vector", "embedding", "embedding_2",
    "lora_pipeline.embedding", "lora_A.weight", "lora_B.weight",
]  # fmt: skip
KEYS = st.lists(st.sampled_from(["", *WORDS]), max_size=5).map(".".join)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 2), max_size=4),
    st.sampled_from([*DTYPES, torch.float8_e4m3fn, torch.int64, torch.bool]),
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["LORA", "none", "to_q", "pissa", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["to_q", "^unet", "|", "x"]), inner, max_size=2)
    ),
)
FIELDS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "bias", "peft_type",
    "modules_to_save", "init_lora_weights", "base_model_name_or_path", "source_metadata",
]  # fmt: skip
CONFIGS = st.dictionaries(st.sampled_from([*FIELDS, *(f"unet.{field}" for field in FIELDS)]), JSON).map(json.dumps)
METADATA = st.dictionaries(
    st.sampled_from(
        ["lora_adapter_metadata", "lora_pipeline", "unet.adapter_config", "text_encoder.adapter_config", "x"]
    ),
    CONFIGS | st.text(),
)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
@settings(max_examples=100)
@given(tensors=st.dictionaries(KEYS, TENSORS, max_size=6), metadata=METADATA)
def test_anything_at_all_is_read_or_refused(form: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    adapter = Adapter({})
    with contextlib.suppress(CorruptError):
        adapter = READERS[form](tensors, metadata)
        WRITERS[form](adapter)
    assert len(adapter.factors) + len(adapter.foreign) <= len(tensors)
