"""Merging into folders made here, tensor by tensor; diffusers as the client is in tests/integration."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.checkpoints import slots
from lora_pipeline.adapters.composition import compose
from lora_pipeline.adapters.fingerprint import base_fingerprint
from lora_pipeline.adapters.header import TensorEntry
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.merging import merge, undo
from lora_pipeline.adapters.storage import read_tensor, read_tensors, write_tensors
from lora_pipeline.errors import CorruptError, MissingError, ParamsError

Make = Callable[..., Adapter]
MakeBase = Callable[..., Path]
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
LAYERS = {
    "mid_block.attentions.0.to_q.weight": (6, 4),
    "mid_block.resnets.0.conv1.weight": (5, 4, 3, 3),
    "mid_block.resnets.0.conv1.bias": (5,),
}
WORDS = ["a</w>", "creature</w>", "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture
def make_base(tmp_path: Path, generator: torch.Generator) -> MakeBase:
    def make(*, level: str = "text_model.", fast: bool = True, dtype: torch.dtype = torch.float16) -> Path:
        base = tmp_path / "base"
        unet = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in LAYERS.items()}
        write_tensors(base / UNET, unet, {"format": "pt"})
        text = {
            f"{level}encoder.layers.0.self_attn.q_proj.weight": torch.randn(8, 8, generator=generator).to(dtype),
            f"{level}embeddings.token_embedding.weight": torch.randn(4, 8, generator=generator).to(dtype),
            f"{level}embeddings.position_ids": torch.arange(3),
        }
        write_tensors(base / TEXT, text, {"format": "pt"})
        vocabulary = {word: index for index, word in enumerate(WORDS)}
        document: dict[str, Any] = {"added_tokens": [{"id": 3, "content": WORDS[3]}], "model": {"vocab": vocabulary}}
        files = {
            "text_encoder/config.json": {"vocab_size": 4, "dtype": "float16"},
            f"tokenizer/{'tokenizer' if fast else 'vocab'}.json": document if fast else vocabulary,
            "unet/config.json": {},
        }
        for name, contents in files.items():
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_text(json.dumps(contents))
        (base / "vae").mkdir()
        (base / "vae" / "weights.safetensors").write_bytes(b"vae")
        (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"stale")
        (base / "v1.ckpt").write_bytes(b"stale")
        return base

    return make


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
def test_weights_are_summed_in_float32_and_rounded_once(
    tmp_path: Path, make_base: MakeBase, make_adapter: Make, dtype: str | None
) -> None:
    base, adapters = make_base(), [make_adapter(1), make_adapter(2)]
    merge(base, [("a", adapters[0], 0.7), ("b", adapters[1], -0.4)], tmp_path / "out", dtype)
    before, after = read_tensors(base / UNET)[0], read_tensors(tmp_path / "out" / UNET)[0]
    for name in ("mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1"):
        changes = [adapter.factors[f"unet.{name}"].delta().double() for adapter in adapters]
        exact = before[f"{name}.weight"].double() + 0.7 * changes[0] - 0.4 * changes[1]
        merged = after[f"{name}.weight"]
        assert merged.dtype == (getattr(torch, dtype) if dtype else torch.float16)
        limit = torch.finfo(merged.dtype).eps / 2 + 1e-6  # half a unit in the last place
        assert float(((merged.double() - exact).abs() / exact.abs()).max()) <= limit + 1e-5 / float(exact.abs().min())


def test_tensors_no_adapter_touches_keep_their_bytes(tmp_path: Path, make_base: MakeBase, make_adapter: Make) -> None:
    base = make_base()
    merge(base, [("a", make_adapter(1), 1.0)], tmp_path / "out", None)
    for name, keys in ((UNET, ["mid_block.resnets.0.conv1.bias"]), (TEXT, ["text_model.embeddings.position_ids"])):
        before, after = read_tensors(base / name), read_tensors(tmp_path / "out" / name)
        assert before[1] == after[1]
        for key in keys:
            assert torch.equal(before[0][key], after[0][key])
    merge(base, [], tmp_path / "nothing", None)
    for path in [UNET, TEXT, "text_encoder/config.json", "tokenizer/tokenizer.json"]:
        assert (base / path).read_bytes() == (tmp_path / "nothing" / path).read_bytes()


def test_merging_a_blend_is_merging_its_parts(tmp_path: Path, make_base: MakeBase, make_adapter: Make) -> None:
    base, first, second = make_base(), make_adapter(1), make_adapter(2)
    parts = [("a", first, 0.9), ("b", second, 0.8)]
    merge(base, parts, tmp_path / "parts", "float32")
    merge(base, [("blend", compose(parts), 1.0)], tmp_path / "blend", "float32")
    for name in (UNET, TEXT):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "blend" / name).read_bytes()


def test_other_files_are_copied_and_stale_weights_left_out(
    tmp_path: Path, make_base: MakeBase, make_adapter: Make
) -> None:
    base = make_base()
    merge(base, [("a", make_adapter(1, base=base_fingerprint(base)), 1.0)], tmp_path / "out", None)
    copied = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    originals = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    stale = {"unet/diffusion_pytorch_model.fp16.safetensors", "v1.ckpt"}
    assert copied == originals - stale | {"lora_pipeline.json"}
    assert (tmp_path / "out" / "vae" / "weights.safetensors").read_bytes() == b"vae"


def test_files_that_nothing_touches_keep_every_byte_and_undoing_gives_all_of_them_back(
    tmp_path: Path, make_base: MakeBase
) -> None:
    """Other programs order a file's header otherwise."""
    base = make_base()
    for name in (UNET, TEXT):
        save_file({key: tensor.contiguous() for key, tensor in read_tensors(base / name)[0].items()}, base / name)
    factors = LoraFactors(torch.ones(1, 4), torch.ones(6, 1), 1.0)
    parts = [("a", Adapter({"unet.mid_block.attentions.0.to_q": factors}), 1.0)]
    merge(base, parts, tmp_path / "merged", None)
    assert (tmp_path / "merged" / TEXT).read_bytes() == (base / TEXT).read_bytes()
    assert (tmp_path / "merged" / UNET).read_bytes() != (base / UNET).read_bytes()
    undo(tmp_path / "merged", base, tmp_path / "undone")
    for name in (UNET, TEXT):
        assert (tmp_path / "undone" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("level", ["", "text_model."])
def test_text_encoder_keys_may_lack_their_level(
    tmp_path: Path, make_base: MakeBase, make_adapter: Make, level: str
) -> None:
    base, adapter = make_base(level=level), make_adapter(1)
    merge(base, [("a", adapter, 1.0)], tmp_path / "out", "float32")
    key = f"{level}encoder.layers.0.self_attn.q_proj.weight"
    change = read_tensors(tmp_path / "out" / TEXT)[0][key] - read_tensors(base / TEXT)[0][key].float()
    expected = adapter.factors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"].delta()
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_tokens_become_rows_and_words(tmp_path: Path, make_base: MakeBase, make_adapter: Make, fast: bool) -> None:
    base, adapter = make_base(fast=fast), make_adapter(1, tokens=("<b>", "<a>"))
    merge(base, [("a", adapter, 0.5)], tmp_path / "out", "float32")
    key = "text_model.embeddings.token_embedding.weight"
    before, after = read_tensors(base / TEXT)[0][key], read_tensors(tmp_path / "out" / TEXT)[0][key]
    rows = torch.cat([adapter.embeddings["<a>"], adapter.embeddings["<b>"]])
    assert torch.equal(after, torch.cat([before.float(), rows]))
    tokenizer = tmp_path / "out" / "tokenizer"
    if fast:
        added = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
        ids = {entry["content"]: entry["id"] for entry in added[1:]}
    else:
        ids = json.loads((tokenizer / "added_tokens.json").read_text())
    assert ids == {"<a>": 4, "<a>_1": 5, "<b>": 6, "<b>_1": 7}
    assert json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())["vocab_size"] == 8
    document = json.loads((tmp_path / "out" / "lora_pipeline.json").read_text())
    assert document["tokens"] == {"<a>": ["<a>", "<a>_1"], "<b>": ["<b>", "<b>_1"]}
    assert document["parents"][0]["weight"] == 0.5


def test_a_token_of_the_base_is_refused(tmp_path: Path, make_base: MakeBase, make_adapter: Make) -> None:
    with pytest.raises(ParamsError, match="Creature"):
        merge(make_base(), [("a", make_adapter(1, tokens=("Creature",)), 1.0)], tmp_path / "out", None)


@pytest.mark.parametrize("other", ["<a>_1", "<A>"])
def test_tokens_that_run_into_each_other_are_refused(
    tmp_path: Path, make_base: MakeBase, make_adapter: Make, other: str
) -> None:
    with pytest.raises(ParamsError, match="another adapter"):
        merge(make_base(), [("a", make_adapter(1, tokens=("<a>", other)), 1.0)], tmp_path / "out", None)


def test_shards_are_merged_each_in_its_file(tmp_path: Path, make_base: MakeBase, make_adapter: Make) -> None:
    base, adapter = make_base(), make_adapter(1)
    merge(base, [("a", adapter, 1.0)], tmp_path / "whole", "float32")
    tensors, metadata = read_tensors(base / UNET)
    (base / UNET).unlink()
    names = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        names[name] = f"diffusion_pytorch_model-{index}.safetensors"
        write_tensors(base / "unet" / names[name], {name: tensor}, metadata)
    (base / f"{UNET}.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": names}))
    merge(base, [("a", adapter, 1.0)], tmp_path / "out", "float32")
    whole = read_tensors(tmp_path / "whole" / UNET)[0]
    for name, shard in names.items():
        assert torch.equal(read_tensors(tmp_path / "out" / "unet" / shard)[0][name], whole[name])
    index = json.loads((tmp_path / "out" / f"{UNET}.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in whole.values())
    (base / "unet" / names["mid_block.resnets.0.conv1.bias"]).unlink()
    with pytest.raises(MissingError, match="shard"):
        merge(base, [("a", adapter, 1.0)], tmp_path / "again", None)


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": 1}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_is_refused(tmp_path: Path, make_base: MakeBase, index: str) -> None:
    base = make_base()
    (base / UNET).unlink()
    (base / f"{UNET}.index.json").write_text(index)
    with pytest.raises(CorruptError, match="index"):
        merge(base, [], tmp_path / "out", None)


def test_refusals_come_before_anything_is_written(tmp_path: Path, make_base: MakeBase, make_adapter: Make) -> None:
    base, out = make_base(), tmp_path / "out"
    unknown = Adapter({"unet.nowhere": LoraFactors(torch.ones(1, 4), torch.ones(6, 1), 1.0)})
    wide = Adapter({"unet.mid_block.attentions.0.to_q": LoraFactors(torch.ones(1, 5), torch.ones(6, 1), 1.0)})
    for adapter in (make_adapter(1, base="another"), unknown, wide, Adapter({}, {"<a>": torch.ones(1, 9)})):
        with pytest.raises(CorruptError):
            merge(base, [("a", adapter, 1.0)], out, None)
    with pytest.raises(ParamsError, match="float8"):
        merge(base, [], out, "float8")
    (base / TEXT).unlink()
    with pytest.raises(MissingError, match=r"model\.safetensors"):
        merge(base, [], out, None)
    assert not out.exists()


def test_a_change_beyond_float16_is_refused(tmp_path: Path, make_base: MakeBase, make_adapter: Make) -> None:
    with pytest.raises(CorruptError, match="float16"):
        merge(make_base(), [("a", make_adapter(1), 1e6)], tmp_path / "out", "float16")


def test_the_fingerprint_tells_bases_apart(make_base: MakeBase) -> None:
    base = make_base()
    before = base_fingerprint(base)
    assert before == base_fingerprint(base)
    (base / "vae" / "weights.safetensors").write_bytes(b"other")
    assert base_fingerprint(base) == before
    contents = bytearray((base / UNET).read_bytes())
    contents[-1] ^= 1
    (base / UNET).write_bytes(contents)
    assert base_fingerprint(base) != before


def test_one_tensor_is_in_memory_at_a_time(
    tmp_path: Path, make_base: MakeBase, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def read(file: BinaryIO, entry: TensorEntry) -> torch.Tensor:
        assert not [reference for reference in seen if reference() is not None]
        tensor = read_tensor(file, entry)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(slots, "read_tensor", read)
    merge(make_base(), [("a", make_adapter(1), 1.0)], tmp_path / "out", "float32")
    assert len(seen) == 5  # all but position_ids, which keep their dtype


def test_tokens_of_sdxl_go_into_both_text_encoders(tmp_path: Path, make_base: MakeBase) -> None:
    base = make_base()
    table = torch.ones(4, 6)
    write_tensors(
        base / "text_encoder_2/model.safetensors", {"text_model.embeddings.token_embedding.weight": table}, {}
    )
    (base / "text_encoder_2" / "config.json").write_text("{}")
    shutil.copytree(base / "tokenizer", base / "tokenizer_2")
    rows, rows_2 = torch.full((2, 8), 2.0), torch.full((2, 6), 3.0)
    merge(base, [("a", Adapter({}, {"<a>": rows}, embeddings_2={"<a>": rows_2}), 1.0)], tmp_path / "out", None)
    second = read_tensors(tmp_path / "out/text_encoder_2/model.safetensors")[0]
    merged = second["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(merged, torch.cat([table, rows_2]))
    words = [(tmp_path / "out" / name / "tokenizer.json").read_bytes() for name in ("tokenizer", "tokenizer_2")]
    assert words[0] == words[1]
    assert b"<a>_1" in words[0]
    for adapter in (Adapter({}, {"<a>": rows}), Adapter({}, {"<a>": rows}, embeddings_2={"<b>": rows_2})):
        with pytest.raises(CorruptError, match="text encoders"):
            merge(base, [("a", adapter, 1.0)], tmp_path / "again", None)


@pytest.mark.parametrize("by", [0, 1])
def test_a_dora_is_merged_as_what_it_makes_of_the_bases_own_weights(
    tmp_path: Path, make_base: MakeBase, make_adapter: Make, by: int
) -> None:
    base, plain, other = make_base(dtype=torch.float32), make_adapter(1), make_adapter(2)
    target = "unet.mid_block.resnets.0.conv1"
    norms = torch.rand((5, 1, 1, 1) if by == 0 else (1, 4, 1, 1)) + 0.5
    dora = Adapter(other.factors, magnitudes={target: norms})
    merge(base, [("plain", plain, 0.7), ("dora", dora, 0.5)], tmp_path / "out", None)
    before, after = read_tensors(base / UNET)[0], read_tensors(tmp_path / "out" / UNET)[0]
    for name, weight in before.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        if name.endswith("bias") or layer not in plain.factors:
            continue
        change = 0.7 * plain.factors[layer].delta()
        changed = weight + other.factors[layer].delta()
        if layer == target:
            lengths = changed.transpose(0, by).flatten(1).norm(dim=1).reshape(norms.shape)
            change += 0.5 * (norms * changed / lengths - weight)
        else:
            change += 0.5 * (changed - weight)
        torch.testing.assert_close(after[name], weight + change, rtol=1e-5, atol=1e-6)
