"""What headers say, for each format, without torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.description import describe
from lora_pipeline.adapters.formats import WRITERS, save
from lora_pipeline.adapters.storage import write_tensors
from lora_pipeline.errors import CorruptError, MissingError


def weights_of(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


# They hold the layers of some bases, or no layers, and have tests of their own.
PARTIAL = {"cloneofsimo", "learned_embeds", "emb_params", "a1111"}


@pytest.mark.parametrize("form", sorted(WRITERS.keys() - PARTIAL))
def test_an_adapter_is_described_from_its_header(
    tmp_path: Path, make_adapter: Callable[..., Adapter], form: str
) -> None:
    adapter = make_adapter(1, tokens=("<a>",), base="b")
    save(adapter, tmp_path / "x", form)
    description = describe(tmp_path / "x")
    assert description.format == form
    assert description.layers == {"text_encoder": 1, "unet": 2}
    assert sum(rank * count for rank, count in description.ranks.items()) == sum(
        factors.rank for factors in adapter.factors.values()
    )
    assert description.tokens == {"<a>": 2}
    alphas = 3 if form == "kohya" else 0  # tensors there, and metadata elsewhere
    assert description.dtypes == {"F32": 7 + alphas}
    numbers = sum(each.down.numel() + each.up.numel() for each in adapter.factors.values())
    assert description.parameters == numbers + 16 + alphas
    files = weights_of(tmp_path / "x")
    assert description.size == sum(path.stat().st_size for path in files)
    assert description.provenance == {"base": "b"}
    assert description.kinds == {"LoRA": 3}
    assert sorted(description.sha256.values()) == sorted(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    )


@pytest.mark.parametrize("form", ["native", "diffusers", "peft"])
def test_alphas_are_counted_where_the_header_has_them(
    tmp_path: Path, make_adapter: Callable[..., Adapter], form: str
) -> None:
    adapter = make_adapter(1)
    save(adapter, tmp_path / "x", form)
    assert describe(tmp_path / "x").alphas == Counter(factors.alpha for factors in adapter.factors.values())


ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
NAMES = {
    f"lora_unet_{ATTENTION}.lora_down.weight": "unet",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": "unet",
    f"unet.{DOTTED}.to_k.lora_A.weight": "unet",
    f"unet.{DOTTED}.to_k.lora_A.default_0.weight": "unet",
    f"unet.{DOTTED}.to_k.lora.down.weight": "unet",
    f"unet.{DOTTED}.processor.to_k_lora.down.weight": "unet",
    f"{DOTTED}.processor.to_k_lora.down.weight": "unet",
    f"base_model.model.{DOTTED}.to_k.lora_A.weight": "unet",
    f"unet.{DOTTED}.to_k.down": "unet",
    "unet:3:down": "unet",
}


@pytest.mark.parametrize(("key", "model"), NAMES.items())
@pytest.mark.parametrize(("width", "family"), [(768, "SD1"), (1024, "SD2"), (2048, "SDXL"), (640, None)])
def test_every_spelling_of_a_layer_is_known(tmp_path: Path, key: str, model: str, width: int, family: str) -> None:
    write_tensors(tmp_path / "x", {key: torch.ones(3, width)}, {})
    description = describe(tmp_path / "x")
    assert description.family == family
    assert description.ranks == {3: 1}
    assert description.layers == {model: 1}
    part = "numbered" if key == "unet:3:down" else "cross-attention"
    assert description.targets == {model: {part: 1}}


TEXT = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ("text_encoder", "feed-forward"),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": ("text_encoder", "self-attention"),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ("text_encoder_2", "feed-forward"),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": ("text_encoder", "feed-forward"),
    "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": ("text_encoder", "feed-forward"),
    "text_encoder:3:down": ("text_encoder", "numbered"),
}


@pytest.mark.parametrize(("key", "place"), TEXT.items())
@pytest.mark.parametrize("width", [768, 1024])
def test_text_encoders_tell_their_family_by_width_or_number(
    tmp_path: Path, key: str, place: tuple[str, str], width: int
) -> None:
    write_tensors(tmp_path / "x", {key: torch.ones(3, width)}, {})
    description = describe(tmp_path / "x")
    model, part = place
    assert description.targets == {model: {part: 1}}
    second = "SD2" if width == 1024 else None
    assert description.family == ("SDXL" if model == "text_encoder_2" else second)


KINDS: dict[str, tuple[dict[str, tuple[int, ...]], str, int]] = {
    "LoHa": ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 768), "hada_w2_a": (6, 2), "hada_w2_b": (2, 768)}, "LoHa", 2),
    "LoKr": ({"lokr_w1": (2, 4), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 192)}, "LoKr", 2),
    "LoKr of a full second": ({"lokr_w1_a": (2, 5), "lokr_w1_b": (5, 4), "lokr_w2": (3, 192)}, "LoKr", 5),
    "full LoKr": ({"lokr_w1": (2, 4), "lokr_w2": (3, 192)}, "LoKr", 3),
    "full": ({"diff": (6, 768), "diff_b": (6,)}, "full", 6),
}


@pytest.mark.parametrize(("shapes", "kind", "rank"), KINDS.values(), ids=KINDS)
def test_every_kind_of_layer_is_counted(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], kind: str, rank: int
) -> None:
    tensors = {f"lora_unet_{ATTENTION}.{suffix}": torch.ones(shape) for suffix, shape in shapes.items()}
    tensors[f"lora_unet_{ATTENTION}.dora_scale"] = torch.ones(6, 1)
    write_tensors(tmp_path / "x", tensors, {})
    description = describe(tmp_path / "x")
    assert description.format == "kohya"
    assert description.kinds == {"DoRA": 1, kind: 1}
    assert description.ranks == {rank: 1}
    assert description.family == "SD1"


def test_what_other_programs_wrote_is_summed_up(tmp_path: Path) -> None:
    metadata = {
        "ss_network_dim": "8",
        "ss_output_name": "x" * 1000,
        "ss_session_id": "1",
        "ss_seed": "None",
        "ss_tag_frequency": json.dumps({"1_a": {"cat ": 3, "dog": 1}, "2_b": {" cat": 4}, "3": [], "4": {"bird": "9"}}),
    }
    write_tensors(tmp_path / "x", {f"lora_unet_{ATTENTION}.lora_down.weight": torch.ones(3, 4)}, metadata)
    assert describe(tmp_path / "x").source == {
        "ss_network_dim": "8",
        "ss_output_name": "x" * 200,
        "tags": "cat (7), dog (1)",
        "further fields": "3",
    }


TOKENS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, int]]] = {
    "bundle": (
        {"bundle_emb.cat.emb_params": (2, 4), "bundle_emb.dog.string_to_param.*": (3, 4)}, {}, {"cat": 2, "dog": 3},
    ),
    "cloneofsimo": ({"<cat>": (4,)}, {"<cat>": "<embed>"}, {"<cat>": 1}),
    "kohya's embedding": ({"emb_params": (2, 4)}, {}, {"*": 2}),
    "SDXL's embedding": ({"clip_l": (2, 4), "clip_g": (2, 6)}, {}, {"*": 2}),
    "diffusers' embedding": ({"<cat>": (4,)}, {}, {"<cat>": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "metadata", "tokens"), TOKENS.values(), ids=TOKENS)
def test_tokens_are_counted_in_every_format(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], tokens: dict[str, int]
) -> None:
    write_tensors(tmp_path / "x", {name: torch.ones(shape) for name, shape in shapes.items()}, metadata)
    assert describe(tmp_path / "x").tokens == tokens


def test_a_checkpoint_is_told_from_an_adapter(tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    write_tensors(tmp_path / "x", {key: torch.ones(8, 1024)}, {})
    description = describe(tmp_path / "x")
    assert (description.format, description.family, description.layers) == ("checkpoint", "SD2", {})


def test_a_peft_folder_is_described_with_its_config(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{DOTTED}.{name}.lora_A.weight": torch.ones(2, 768) for name in ("to_k", "to_v")}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {})
    config = {"lora_alpha": 8, "alpha_pattern": {"to_k": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    description = describe(tmp_path)
    assert description.format == "peft"
    assert description.alphas == {4.0: 1, 8.0: 1}


@pytest.mark.parametrize("merged", [True, False])
def test_a_diffusers_folder_is_described_with_what_was_merged_into_it(tmp_path: Path, merged: bool) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    files = {"unet/diffusion_pytorch_model.safetensors": {f"{DOTTED}.to_k.weight": torch.ones(8, 2048)}}
    files["text_encoder/model.safetensors"] = {"encoder.weight": torch.ones(3)}
    for name, tensors in files.items():
        write_tensors(tmp_path / name, tensors, {})
    if merged:
        (tmp_path / "lora_pipeline.json").write_text('{"kind": "merged"}')
    description = describe(tmp_path)
    assert description.format == ("merged folder" if merged else "diffusers folder")
    assert description.provenance == ({"kind": "merged"} if merged else {})
    assert description.family == "SDXL"
    assert description.parameters == 8 * 2048 + 3
    assert description.sha256.keys() == files.keys()


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({}, "no PEFT folder"),
        ({"adapter_config.json": b"\xff"}, "no text"),
        ({"model_index.json": b""}, "no such file"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, contents: dict[str, bytes], said: str) -> None:
    tensors = {f"base_model.model.{DOTTED}.to_k.lora_A.weight": torch.ones(2, 768)}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {})
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text)
    if "model_index.json" in contents:
        (tmp_path / "unet").mkdir()
    with pytest.raises((CorruptError, MissingError), match=said):
        describe(tmp_path)


@pytest.mark.parametrize(
    "metadata", [{}, {"lora_pipeline": "{"}, {"lora_pipeline": "[]"}, {"lora_pipeline": '{"provenance": 1}'}]
)
def test_other_files_are_described_too(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_tensors(tmp_path / "x", {"conv_in.weight": torch.ones(2, 3), "scalar": torch.tensor(1.0)}, metadata)
    description = describe(tmp_path / "x")
    assert description.format == "unknown"
    assert description.parameters == 7
    assert description.provenance == {}


def test_describing_needs_no_torch(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {f"lora_unet_{ATTENTION}.lora_down.weight": torch.ones(3, 768)}, {})
    describing = "import sys, pathlib, stages.inspect as verb; verb.describe(pathlib.Path(sys.argv[1]))"
    code = f"{describing}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False).returncode == 0
