"""PEFT folders: what goes in comes out, which model a folder is for, and what is refused."""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.description import describe
from lora_pipeline.adapters.formats import peft, save
from lora_pipeline.adapters.formats.lora_config import Patterns
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.storage import write_tensors
from lora_pipeline.errors import CorruptError, MissingError, ResourceError

Make = Callable[..., Adapter]
UNET_PATH, TEXT_PATH = "mid_block.attentions.0.proj_in", "encoder.layers.0.self_attn.q_proj"
TO_Q = f"unet.{UNET_PATH}"
FACTORS = LoraFactors(torch.ones(2, 3), torch.full((4, 2), 2.0), 0.3)


def folder_of(folder: Path, path: str, fields: dict[str, Any] | str, **extra: Tensor) -> Path:
    """A folder as PEFT writes it, of one layer."""
    names = {f"{path}.lora_A.weight": FACTORS.down, f"{path}.lora_B.weight": FACTORS.up, **extra}
    tensors = {f"base_model.model.{name}": tensor for name, tensor in names.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    text = fields if isinstance(fields, str) else json.dumps({"peft_type": "LORA", "r": 2, **fields})
    (folder / "adapter_config.json").write_text(text)
    return folder


def layout(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (UNET_PATH, TO_Q),
        ("conv_in", "unet.conv_in"),
        (TEXT_PATH, f"text_encoder.text_model.{TEXT_PATH}"),
        (f"text_model.{TEXT_PATH}", f"text_encoder.text_model.{TEXT_PATH}"),
        ("text_model.encoder.layers.31.mlp.fc1", "text_encoder_2.text_model.encoder.layers.31.mlp.fc1"),
        ("text_projection", "text_encoder_2.text_model.text_projection"),
    ],
)
def test_the_keys_tell_which_model_a_folder_is_for(tmp_path: Path, path: str, target: str) -> None:
    folder = folder_of(tmp_path, path, {"lora_alpha": 6})
    (found, factors), *others = load_adapter(folder).factors.items()
    assert (found, others, factors.scale) == (target, [], 3.0)
    assert describe(folder).layers == {target.partition(".")[0]: 1}


def test_sub_folders_are_told_by_their_names(tmp_path: Path) -> None:
    for name in ("text_encoder", "text_encoder_2"):
        folder_of(tmp_path / name, TEXT_PATH, {"lora_alpha": 4})
    folder_of(tmp_path, UNET_PATH, {"lora_alpha": 6})
    scales = {target.partition(".")[0]: factors.scale for target, factors in load_adapter(tmp_path).factors.items()}
    assert scales == {"unet": 3.0, "text_encoder": 2.0, "text_encoder_2": 2.0}


def test_rank_stabilised_scaling_becomes_part_of_alpha(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, UNET_PATH, {"lora_alpha": 3, "use_rslora": True})
    (factors,) = load_adapter(folder).factors.values()
    assert factors.scale == pytest.approx(3 / math.sqrt(2), rel=1e-15)


def test_a_folder_for_a_unet_alone_has_no_sub_folders(tmp_path: Path, make_adapter: Make) -> None:
    save(Adapter({TO_Q: FACTORS}), tmp_path / "x", "peft")
    assert layout(tmp_path / "x") == {"adapter_config.json", "adapter_model.safetensors"}
    save(make_adapter(1, tokens=("<a>",)), tmp_path / "x", "peft")
    models = {
        f"{name}/adapter_{file}" for name in ("unet", "text_encoder") for file in ("config.json", "model.safetensors")
    }
    assert layout(tmp_path / "x") == {*models, "learned_embeds.safetensors"}


def test_tokens_of_both_of_sdxls_encoders_come_back(tmp_path: Path) -> None:
    adapter = Adapter({}, {"<a/b>": torch.ones(1, 2)}, {"base": "b"}, embeddings_2={"<a/b>": torch.ones(1, 3)})
    save(adapter, tmp_path / "x", "peft")
    again = load_adapter(tmp_path / "x")
    assert again.embeddings["<a/b>"].shape == (1, 2)
    assert again.embeddings_2["<a/b>"].shape == (1, 3)
    assert again.provenance == {"base": "b"}


def test_a_folder_of_textual_inversion_is_read_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "learned_embeds.safetensors", {"<a>": torch.ones(3)}, {})
    assert load_adapter(tmp_path).embeddings["<a>"].shape == (1, 3)


def test_what_the_configuration_says_of_its_base_is_kept(tmp_path: Path) -> None:
    said = {"base_model_name_or_path": "some/base", "revision": None, "task_type": "X", "lora_dropout": 0.1}
    adapter = load_adapter(folder_of(tmp_path / "x", UNET_PATH, said))
    save(adapter, tmp_path / "y", "peft")
    fields = json.loads((tmp_path / "y" / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["task_type"]) == ("some/base", "X")
    assert load_adapter(tmp_path / "y").provenance == adapter.provenance


def test_unknown_tensors_are_carried_along(tmp_path: Path) -> None:
    name = "text_model.embeddings.token_embedding.weight"
    folder = folder_of(tmp_path / "x" / "text_encoder", TEXT_PATH, {}, **{name: torch.ones(5, 3)}).parent
    adapter = load_adapter(folder)
    assert set(adapter.foreign) == {f"text_encoder.base_model.model.{name}"}
    save(adapter, tmp_path / "y", "peft")
    assert torch.equal(load_adapter(tmp_path / "y").foreign[min(adapter.foreign)], torch.ones(5, 3))
    with pytest.raises(CorruptError):
        peft.render(Adapter({TO_Q: FACTORS}, foreign={"unet.conv_in.bias": torch.ones(1)}))


def refused(path: Path) -> CorruptError:
    with pytest.raises(CorruptError) as caught:
        load_adapter(path)
    assert caught.value.where.startswith(str(path))
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ("{", "adapter_config"),
        ("[]", "adapter_config"),
        ("", "adapter_config"),
        ({"peft_type": "LOKR"}, "peft_type"),
        ({"bias": "lora_only"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"init_lora_weights": "PiSSA"}, "init_lora_weights"),
        ({"use_dora": True}, f"{UNET_PATH}.lora_A.weight"),
        ({"r": 3}, "rank_pattern"),
        ({"alpha_pattern": {"(x+x+)+y": 1}}, "alpha_pattern"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, fields: dict[str, Any] | str, named: str) -> None:
    assert named in refused(folder_of(tmp_path, UNET_PATH, fields)).where


def test_a_configuration_that_is_no_text_or_too_much_of_it_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, UNET_PATH, {})
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe")
    assert "text" in refused(folder).problem
    with (folder / "adapter_config.json").open("wb") as file:
        file.truncate(2**34)
    assert "bytes" in refused(folder).problem


@pytest.mark.parametrize("end", ["A", "B"])
def test_changes_of_a_token_table_are_refused_by_name(tmp_path: Path, end: str) -> None:
    name = f"text_model.embeddings.token_embedding.lora_embedding_{end}"
    assert name in refused(folder_of(tmp_path, TEXT_PATH, {}, **{name: torch.ones(2, 2)})).where


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    assert "folder" in refused(tmp_path).problem
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingError, match=r"adapter_model\.safetensors"):
        load_adapter(tmp_path)
    folder_of(tmp_path, "model.layers.0.self_attn.q_proj", {})
    assert "neither" in refused(tmp_path).problem
    folder_of(tmp_path / "unet", UNET_PATH, {})
    folder_of(tmp_path, UNET_PATH, {})
    assert "two adapters" in refused(tmp_path).problem


def test_the_weights_without_their_configuration_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, UNET_PATH, {})
    error = refused(tmp_path / "adapter_model.safetensors")
    assert "adapter_config.json" in error.problem
    assert "folder" in error.fix


def test_a_folder_replaces_an_older_one_whole(tmp_path: Path, make_adapter: Make) -> None:
    save(make_adapter(1, tokens=("<a>",)), tmp_path / "x", "peft")
    save(Adapter({TO_Q: FACTORS}), tmp_path / "x", "peft")
    assert layout(tmp_path / "x") == {"adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_nothing_of_others_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "unet").mkdir(parents=True)
    (tmp_path / "folder" / "unet" / "thesis.tex").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(CorruptError, match="already"):
            save(Adapter({TO_Q: FACTORS}), tmp_path / name, "peft")
    assert layout(tmp_path) == {"file", "folder/unet/thesis.tex"}


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_leaves_the_older_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    save(Adapter({TO_Q: FACTORS}), tmp_path / "x", "peft")
    rename = Path.rename

    def fail(path: Path, *arguments: Any) -> Any:
        if step == "rename" and not path.name.endswith("partial"):
            return rename(path, *arguments)
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "write_text" if step == "write" else "rename", fail)
    with pytest.raises(ResourceError):
        save(Adapter({TO_Q: LoraFactors(torch.ones(1, 3), torch.ones(4, 1), 1.0)}), tmp_path / "x", "peft")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert load_adapter(tmp_path / "x").factors[TO_Q].alpha == 0.3


NAMES = st.lists(st.sampled_from(["to_q", "attn1", "0"]), min_size=1, max_size=4).map(".".join)
PATTERNS = st.lists(st.tuples(st.booleans(), NAMES, st.booleans()), min_size=1, max_size=2).map(
    lambda names: "|".join(
        "^" * start + (name.replace(".", r"\.") if escaped else name) for start, name, escaped in names
    )
)


@given(st.dictionaries(PATTERNS, st.integers(), max_size=5), NAMES)
def test_patterns_follow_pefts_rule(patterns: dict[str, int], path: str) -> None:
    fitting = [number for pattern, number in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
    assert Patterns(patterns).get(path, None) == (fitting[0] if fitting else None)


@pytest.mark.parametrize("pattern", [TEXT_PATH, f"text_model.{TEXT_PATH}", f"^{TEXT_PATH}", f"^text_model.{TEXT_PATH}"])
@pytest.mark.parametrize("path", [TEXT_PATH, f"text_model.{TEXT_PATH}"])
def test_patterns_mean_a_text_encoders_layer_with_and_without_its_level(pattern: str, path: str) -> None:
    assert Patterns({pattern: 1}).get(path, None) == 1
