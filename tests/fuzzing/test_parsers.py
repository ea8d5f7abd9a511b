"""Hostile files: read or refused, never another exception, and never more memory than the file could need."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.description import describe
from lora_pipeline.adapters.formats import WRITERS, save
from lora_pipeline.adapters.header import BYTES_PER_ELEMENT
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import PipelineError

THE_SAME_EACH_TIME = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
EMBEDDING_FORMATS = ("learned_embeds", "emb_params", "a1111")
WORDS = (
    "", "unet.", "text_encoder.text_model.", "text_encoder_2.text_model.", "lora_unet_", "lora_te_", "lora_te1_",
    "lora_te2_", "base_model.model.", "bundle_emb.", "embedding.", "embedding_2.", "foreign.",
    "lora_pipeline.embedding.", "unet:0", "unet:1", "text_encoder:0", "model.diffusion_model.", "<a>", "emb_params",
    "clip_l", "clip_g", "string_to_param.*", ATTENTION, ATTENTION.replace(".", "_"), "mid_block.resnets.0.conv1",
    "mid_block_resnets_0_conv1", "encoder.layers.0.mlp.fc1", "input_blocks_4_1_proj_in",
)  # fmt: skip
SUFFIXES = (
    "", ".down", ".up", ":down", ":up", ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha",
    ".lora_A.weight", ".lora_B.weight", ".lora.down.weight", ".lora.up.weight", ".processor.to_q_lora.down.weight",
    ".lora_linear_layer.up.weight", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2",
    ".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2", ".diff", ".diff_b",
    ".dora_scale", ".magnitude", ".lora_magnitude_vector", ".w_norm", ".weight",
)  # fmt: skip
KEYS = (
    "lora_pipeline", "lora_adapter_metadata", "unet", "text_encoder", "<a>", "unet:0:rank", "ss_network_module",
    "ss_tag_frequency", "ss_network_dim", "modelspec.architecture", "format", "unet.adapter_config",
)  # fmt: skip
FIELDS = (
    "alphas", "format", "provenance", "unet.r", "unet.lora_alpha", "unet.rank_pattern", "unet.alpha_pattern", "r",
    "unet.use_rslora", "lora_alpha", "target_modules", "unet.target_modules", "source_metadata", f"unet.{ATTENTION}",
)  # fmt: skip


def written(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path


def assert_read_or_refused(path: Path) -> None:
    for read in (partial(load_adapter, allow_pickle=True), describe):
        refusal = None
        try:
            read(path)
        except PipelineError as error:
            refusal = error
        assert refusal is None or (refusal.fix and str(path) in refusal.where)


def seed_adapter(form: str) -> Adapter:
    """Real names and shapes small enough to be flipped byte by byte."""
    if form in EMBEDDING_FORMATS:
        return Adapter({}, {"<a>": torch.ones(2, 768)})
    source = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 768, generator=source).half(), torch.randn(320, 2, generator=source).half()
    return Adapter({f"unet.{ATTENTION}": LoraFactors(down, up, 1.0)})


@settings(THE_SAME_EACH_TIME, max_examples=300)
@given(contents=st.binary(max_size=300), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_bytes(tmp_path: Path, contents: bytes, length: int | None) -> None:
    assert_read_or_refused(
        written(tmp_path / "x", contents if length is None else struct.pack("<Q", length) + contents)
    )


@pytest.mark.parametrize("form", WRITERS)
@settings(THE_SAME_EACH_TIME, max_examples=150)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    in_header=st.booleans(), cut=st.floats(0.5, 1.5), which=st.integers(0, 9),
)  # fmt: skip
def test_flipped_bytes(
    tmp_path: Path, form: str, flips: list[tuple[float, int]], in_header: bool, cut: float, which: int
) -> None:
    path = tmp_path / "x"
    save(seed_adapter(form), path, form)
    files = sorted(each for each in path.rglob("*") if each.is_file()) or [path]  # one format is a folder
    damaged = files[which % len(files)]
    contents = bytearray(damaged.read_bytes())
    header = 8 + struct.unpack("<Q", contents[:8])[0]
    reach = min(header, len(contents)) if in_header else len(contents)
    for position, value in flips:
        contents[int(position * reach)] = value
    damaged.write_bytes(contents[: int(cut * len(contents))])
    assert_read_or_refused(path)


def names() -> st.SearchStrategy[str]:
    parts = st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS), st.sampled_from(SUFFIXES))
    return st.one_of(parts.map("".join), st.text(max_size=20))


def shapes() -> st.SearchStrategy[list[int]]:
    lengths = st.sampled_from((0, 1, 2, 3, 4, 8, 768))
    return st.one_of(st.lists(lengths, max_size=4), st.lists(st.integers(0, 5), max_size=9))


def documents() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from((1, "1", 1e400, 10**400)),
    )
    keys = st.one_of(st.sampled_from(FIELDS), st.text(max_size=8))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
        max_leaves=8,
    )


def metadata() -> st.SearchStrategy[dict[str, str]]:
    texts = st.one_of(documents().map(json.dumps), st.text(max_size=20), st.just("<embed>"), st.just("[" * 5000))
    return st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=8)), texts, max_size=4)


@settings(THE_SAME_EACH_TIME, max_examples=800)
@given(
    tensors=st.dictionaries(names(), st.tuples(st.sampled_from(sorted(BYTES_PER_ELEMENT)), shapes()), max_size=6),
    texts=metadata(), seed=st.integers(0, 255),
)  # fmt: skip
def test_well_formed_files_of_anything(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], texts: dict[str, str], seed: int
) -> None:
    fields: dict[str, object] = {"__metadata__": texts}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = int(torch.Size(shape).numel()) * BYTES_PER_ELEMENT[dtype]
        if size < 2**20 and name != "__metadata__":
            fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
    text = json.dumps(fields).encode()
    assert_read_or_refused(written(tmp_path / "x", struct.pack("<Q", len(text)) + text + bytes([seed % 64]) * position))


LAYER = f"lora_unet_{ATTENTION.replace('.', '_')}"
TARGET = f"unet.{ATTENTION}"
KINDS = {
    "lora": (LAYER, ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale")),
    "loha": (LAYER, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha")),
    "lokr": (LAYER, ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha")),
    "full": (LAYER, ("diff", "diff_b", "dora_scale")),
    "diffusers": (TARGET, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha", "lora.down.weight")),
    "native": (TARGET, ("down", "up", "magnitude")),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(THE_SAME_EACH_TIME, max_examples=150)
@given(data=st.data())
def test_modules_of_shapes_that_need_not_fit(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    layer, suffixes = KINDS[kind]
    present = data.draw(st.lists(st.sampled_from(suffixes), unique=True, min_size=1))
    fields: dict[str, object] = {}
    if kind == "native":
        fields["__metadata__"] = {"lora_pipeline": json.dumps({"alphas": {TARGET: 1}, "format": 1, "provenance": {}})}
    position = 0
    for suffix in present:
        shape = data.draw(st.lists(st.sampled_from((1, 2, 3)), max_size=4))
        dtype = data.draw(st.sampled_from(("F32", "F16", "I8", "F8_E4M3", "BOOL")))
        size = int(torch.Size(shape).numel()) * BYTES_PER_ELEMENT[dtype]
        fields[f"{layer}.{suffix}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(fields).encode()
    assert_read_or_refused(written(tmp_path / "x", struct.pack("<Q", len(text)) + text + b"\x01" * position))


CLAIMS: dict[str, Callable[[], dict[str, object]]] = {
    "10^15 numbers": lambda: {"a": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}},
    "10^15 numbers in no bytes": lambda: {"a": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 0]}},
    "10^15 rows of nothing": lambda: {f"{TARGET}.down": {"dtype": "F32", "shape": [10**15, 0], "data_offsets": [0, 0]}},
    "2^63 rows of nothing": lambda: {f"{TARGET}.down": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}},
    "2^40 x 2^40 x 0": lambda: {"a": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
    "many tensors": lambda: {f"a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_beyond_the_file_cost_nothing(tmp_path: Path, claim: str) -> None:
    text = json.dumps(CLAIMS[claim]()).encode()
    assert_read_or_refused(written(tmp_path / "x", struct.pack("<Q", len(text)) + text))
