"""Single files made here by their published names; diffusers' converters are the judge in tests/integration."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.checkpoints.torch_file import NOTE, stream_torch_file
from lora_pipeline.adapters.fingerprint import base_fingerprint
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.merging import convert_checkpoint, merge, undo
from lora_pipeline.adapters.storage import read_tensors, write_tensors
from lora_pipeline.adapters.weights import open_weights
from lora_pipeline.errors import CorruptError, MissingError, PipelineError, ResourceError, UsageError

# diffusers' names of published SD2 tensors, by the file's; two resolutions of one layer
UNET = {
    "input_blocks.0.0.weight": "conv_in.weight",
    "input_blocks.1.0.in_layers.2.weight": "down_blocks.0.resnets.0.conv1.weight",
    "input_blocks.2.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ),
    "input_blocks.3.1.proj_in.weight": "down_blocks.1.attentions.0.proj_in.weight",
    "middle_block.2.emb_layers.1.bias": "mid_block.resnets.1.time_emb_proj.bias",
    "output_blocks.1.2.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.1.1.proj_in.weight": "up_blocks.0.attentions.1.proj_in.weight",
    "output_blocks.3.0.skip_connection.weight": "up_blocks.1.resnets.1.conv_shortcut.weight",
    "time_embed.2.weight": "time_embedding.linear_2.weight",
    "out.2.bias": "conv_out.bias",
}
VAE = {
    "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "decoder.up.0.block.2.conv1.weight": "decoder.up_blocks.1.resnets.2.conv1.weight",
    "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
}
TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
ATTENTION = "text_encoder.text_model.encoder.layers.0.self_attn"
IN_PROJ = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"


def sd2(generator: torch.Generator) -> dict[str, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half()

    tensors = {f"model.diffusion_model.{name}": random(4, 4) for name in UNET}
    tensors |= {f"first_stage_model.{name}": random(4, 4, 1, 1) for name in VAE}
    inner = "cond_stage_model.model."
    tensors |= {
        f"{inner}transformer.resblocks.0.attn.in_proj_weight": random(24, 8),
        f"{inner}transformer.resblocks.0.attn.in_proj_bias": random(24),
        f"{inner}token_embedding.weight": random(5, 8),
        f"{inner}text_projection": random(8, 6),
        f"{inner}logit_scale": random(),
        "betas": torch.arange(3).double(),
    }
    return tensors


def factors(width: int) -> LoraFactors:
    source = torch.Generator().manual_seed(width)
    return LoraFactors(torch.randn(2, width, generator=source), torch.randn(width, 2, generator=source), 3.0)


@pytest.fixture
def base(tmp_path: Path, generator: torch.Generator) -> Path:
    write_tensors(tmp_path / "base.safetensors", sd2(generator), {"modelspec.title": "mine"})
    return tmp_path / "base.safetensors"


@pytest.fixture
def touching() -> Adapter:
    return Adapter({TO_Q: factors(4), f"{ATTENTION}.k_proj": factors(8)})


def test_names_are_the_published_ones(base: Path) -> None:
    weights, file = open_weights(base), read_tensors(base)[0]
    for theirs, ours in UNET.items():
        assert torch.equal(weights.read(f"unet.{ours}"), file[f"model.diffusion_model.{theirs}"])
    fused = file[IN_PROJ]
    for index, part in enumerate("qkv"):
        name = f"{ATTENTION}.{part}_proj.weight"
        assert weights.shape(name) == (8, 8)
        assert torch.equal(weights.read(name), fused[8 * index : 8 * (index + 1)])
    projection = "text_encoder.text_model.text_projection.weight"
    assert weights.shape(projection) == (6, 8)
    assert torch.equal(weights.read(projection), file["cond_stage_model.model.text_projection"].T)
    assert not [name for name in weights.places if name.startswith(("vae.", "other."))]


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_merge_changes_the_touched_layers_and_no_other_byte(
    tmp_path: Path, base: Path, touching: Adapter, suffix: str, dtype: str | None
) -> None:
    out = tmp_path / f"out.{suffix}"
    merge(base, [("a", touching, 0.5)], out, dtype)
    before = read_tensors(base)[0]
    after = torch.load(out, weights_only=True)["state_dict"] if suffix == "ckpt" else read_tensors(out)[0]
    assert after.keys() == before.keys()
    expected = {key: tensor.double() for key, tensor in before.items()}
    to_q = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
    expected[to_q] += 0.5 * touching.factors[TO_Q].delta().double()
    expected[IN_PROJ][8:16] += 0.5 * touching.factors[f"{ATTENTION}.k_proj"].delta().double()
    for key, tensor in after.items():
        changes = dtype and key.startswith(("model.", "cond")) and not key.endswith("logit_scale")
        assert tensor.dtype == (torch.float32 if changes else before[key].dtype), key
        if key in (to_q, IN_PROJ):
            torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(tensor.double(), expected[key]), key
    assert not torch.equal(after[to_q].double(), before[to_q].double())


def test_provenance_is_in_the_file(tmp_path: Path, base: Path, touching: Adapter) -> None:
    merge(base, [("a", touching, 0.5)], tmp_path / "out.safetensors", None)
    merge(base, [("a", touching, 0.5)], tmp_path / "out.ckpt", None)
    metadata = read_tensors(tmp_path / "out.safetensors")[1]
    assert metadata["modelspec.title"] == "mine"
    document = json.loads(metadata["lora_pipeline_merge"])
    assert document["base"] == base_fingerprint(base)
    assert [(parent["name"], parent["weight"]) for parent in document["parents"]] == [("a", 0.5)]
    with zipfile.ZipFile(tmp_path / "out.ckpt") as archive:
        assert json.loads(archive.read(NOTE)) == document


@pytest.mark.parametrize("merged", ["merged.safetensors", "merged.ckpt"])
def test_undoing_a_merge_gives_the_base_back(tmp_path: Path, base: Path, touching: Adapter, merged: str) -> None:
    merge(base, [("a", touching, 0.5)], tmp_path / merged, "float32")
    undo(tmp_path / merged, base, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


def test_undoing_needs_the_same_base(tmp_path: Path, base: Path, touching: Adapter) -> None:
    merge(base, [("a", touching, 0.5)], tmp_path / "merged.safetensors", None)
    tensors, metadata = read_tensors(base)
    tensors["betas"] += 1
    write_tensors(tmp_path / "other.safetensors", tensors, metadata)
    with pytest.raises(CorruptError, match="fingerprint"):
        undo(tmp_path / "merged.safetensors", tmp_path / "other.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(MissingError, match="which base"):
        undo(base, base, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "note", ["", "[]", "null", "{", '{"kind": "merged"}', '{"kind": "merged", "base": 3}', "[" * 9999]
)
def test_a_note_that_says_nothing_is_refused(tmp_path: Path, base: Path, note: str) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"lora_pipeline_merge": note})
    with pytest.raises(MissingError, match="which base"):
        undo(tmp_path / "x.safetensors", base, tmp_path / "out.safetensors")


def test_tokens_need_a_tokenizer(tmp_path: Path, base: Path, touching: Adapter) -> None:
    worded = Adapter(touching.factors, {"<zorp>": torch.ones(1, 8)})
    with pytest.raises(UsageError, match="no tokenizer") as caught:
        merge(base, [("a", worded, 1.0)], tmp_path / "out.safetensors", None)
    assert "--without-tokens" in caught.value.fix
    merge(base, [("a", worded, 1.0)], tmp_path / "out.safetensors", None, tokens=False)
    merge(base, [("a", touching, 1.0)], tmp_path / "plain.safetensors", None)
    ours, plain = (read_tensors(tmp_path / f"{name}.safetensors")[0] for name in ("out", "plain"))
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_a_folder_of_a_single_file_needs_a_model(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UsageError, match="configs") as caught:
        convert_checkpoint(base, tmp_path / "folder")
    assert "--like" in caught.value.fix


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a.weight": torch.zeros(2)}, "model.diffusion_model"),
        ({"model.diffusion_model.out.2.bias": torch.zeros(2), IN_PROJ: torch.zeros(4, 2)}, "equal parts"),
        (
            {
                "model.diffusion_model.out.2.bias": torch.zeros(2),
                "cond_stage_model.transformer.final.weight": torch.zeros(2),
                "cond_stage_model.transformer.text_model.final.weight": torch.zeros(2),
            },
            "is another",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor], named: str) -> None:
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(CorruptError, match=named):
        merge(tmp_path / "x.safetensors", [], tmp_path / "out.safetensors", None)


def test_an_adapter_of_another_family_is_refused(tmp_path: Path, base: Path) -> None:
    other = Adapter({"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": factors(8)})
    with pytest.raises(CorruptError, match="no layer"):
        merge(base, [("a", other, 1.0)], tmp_path / "out.safetensors", None)
    with pytest.raises(CorruptError, match="float16"):
        merge(base, [("a", Adapter({TO_Q: factors(4)}), 1e7)], tmp_path / "out.safetensors", None)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_full_disk_keeps_the_old_file(
    tmp_path: Path, base: Path, touching: Adapter, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"out.{suffix}"
    out.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="space"):
        merge(base, [("a", touching, 1.0)], out, None)
    assert out.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == sorted([base, out])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_torch_reads_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    names = {torch.bool: "BOOL", torch.uint8: "U8", torch.int64: "I64", torch.bfloat16: "BF16", torch.float64: "F64"}
    tensors = {name: torch.ones(shape).to(dtype) for name, shape in {"b": (), "a": (2, 1, 3), "c": (0, 2)}.items()}
    layout = {name: (names[dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_torch_file(tmp_path / "x.ckpt", layout, None, lambda name: [tensors[name]])
    read = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in read.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()
    }
    with pytest.raises(CorruptError, match="F8"):
        stream_torch_file(tmp_path / "y.ckpt", {"a": ("F8_E4M3", (1,))}, None, lambda _: [])


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_a_damaged_ckpt_is_refused(tmp_path: Path, base: Path, contents: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(contents)
    with pytest.raises(PipelineError, match=r"x\.ckpt"):
        undo(tmp_path / "x.ckpt", base, tmp_path / "out.safetensors")
