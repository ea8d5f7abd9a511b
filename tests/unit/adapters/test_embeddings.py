"""Files of embeddings, plain and pickled, and pickles that must not be opened."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import save
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.pickled import read_pickle, write_pickle
from lora_pipeline.adapters.positions import LEGACY, UNET_CLASSES, unet_targets
from lora_pipeline.adapters.storage import write_tensors
from lora_pipeline.adapters.topology import SD1, layers
from lora_pipeline.errors import CorruptError

ROWS = torch.arange(1536.0).reshape(2, 768)
WIDE = torch.arange(2560.0).reshape(2, 1280)


def same(one: Adapter, other: Adapter) -> bool:
    def listed(adapter: Adapter) -> list[Any]:
        both = (adapter.embeddings, adapter.embeddings_2)
        return [{token: rows.tolist() for token, rows in each.items()} for each in both]

    return listed(one) == listed(other) and one.provenance == other.provenance


@pytest.mark.parametrize(
    ("form", "adapter"),
    [
        ("learned_embeds", Adapter({}, {"<a>": ROWS}, {"base": "b"})),
        ("learned_embeds", Adapter({}, {"<a>": ROWS[:1]})),
        ("emb_params", Adapter({}, {"<a>": ROWS}, {"base": "b"})),
        ("emb_params", Adapter({}, {"<a>": ROWS}, embeddings_2={"<a>": WIDE})),
        ("emb_params", Adapter({}, embeddings_2={"<a>": WIDE})),
        ("a1111", Adapter({}, {"<a>": ROWS}, {"source_metadata": {"step": "7", "sd_checkpoint_name": "x"}})),
    ],
)
def test_an_embedding_comes_back_as_it_went(tmp_path: Path, form: str, adapter: Adapter) -> None:
    save(adapter, tmp_path / "x", form)
    assert same(load_adapter(tmp_path / "x", allow_pickle=form == "a1111"), adapter)
    save(adapter, tmp_path / "y", form)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "first", "second"),
    [
        ({"<cat>": ROWS[0]}, {"<cat>": ROWS[:1]}, {}),
        ({"emb_params": ROWS}, {"my-cat": ROWS}, {}),
        ({"clip_l": ROWS, "clip_g": WIDE}, {"my-cat": ROWS}, {"my-cat": WIDE}),
        ({"<a>": ROWS, "<b>": ROWS[0]}, {"<a>": ROWS, "<b>": ROWS[:1]}, {}),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_what_other_programs_wrote_is_read(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    first: dict[str, torch.Tensor],
    second: dict[str, torch.Tensor],
    pickled: bool,
) -> None:
    if pickled:
        torch.save(tensors, tmp_path / "my-cat.bin")
    else:
        write_tensors(tmp_path / "my-cat.bin", tensors, {})
    assert same(load_adapter(tmp_path / "my-cat.bin", allow_pickle=pickled), Adapter({}, first, {}, {}, second))


def test_an_embedding_of_a_user_interface_is_read(tmp_path: Path) -> None:
    value = {
        "string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.nn.Parameter(ROWS)},
        "name": "puppy", "step": 1499, "sd_checkpoint": "cc6cb27103", "sd_checkpoint_name": "v1-5",
    }  # fmt: skip
    torch.save(value, tmp_path / "x.pt")
    adapter = load_adapter(tmp_path / "x.pt", allow_pickle=True)
    assert torch.equal(adapter.embeddings["puppy"], ROWS)
    said = {"step": "1499", "sd_checkpoint": "cc6cb27103", "sd_checkpoint_name": "v1-5"}
    assert adapter.provenance == {"source_metadata": said}


@pytest.fixture(scope="module")
def old_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three files, of every layer that was learnt then."""
    folder = tmp_path_factory.mktemp("old")
    shapes = [layers(SD1)[target] for target in unet_targets(UNET_CLASSES[0], LEGACY)]
    unet = [each for out, inn, *_ in shapes for each in (torch.ones(out, 2).half(), torch.full((2, inn), 0.5).half())]
    torch.save(unet, folder / "lora.pt")
    torch.save([torch.ones(768, 1), torch.ones(1, 768)] * 48, folder / "lora.text_encoder.pt")
    torch.save({"<s1>": ROWS[0]}, folder / "lora.ti.pt")
    return folder


@pytest.mark.parametrize("given", ["lora.pt", "lora.text_encoder.pt", "lora.ti.pt"])
def test_the_three_files_of_an_old_lora_are_one_adapter(old_lora: Path, given: str) -> None:
    adapter = load_adapter(old_lora / given, allow_pickle=True)
    assert len(adapter.factors) == 192
    assert adapter.provenance == {"order": LEGACY}
    factors = adapter.factors["unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"]
    assert factors.up.dtype == torch.float16
    assert torch.equal(factors.delta(), torch.ones(10240, 1280))
    assert torch.equal(adapter.embeddings["<s1>"], ROWS[:1])


class Bomb:
    """What a hostile pickle holds: a call that reading it makes."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_no_pickle_runs_code(tmp_path: Path, kind: str, allowed: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    if kind == "bare":
        path.write_bytes(pickle.dumps({"<a>": Bomb(canary)}))
    else:
        torch.save({"<a>": Bomb(canary)}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CorruptError) as error:
        load_adapter(path, allow_pickle=allowed)
    assert str(path) in error.value.where
    assert not canary.exists()


def test_a_pickle_needs_consent_and_the_error_says_how(tmp_path: Path) -> None:
    torch.save({"<a>": ROWS}, tmp_path / "x.pt")
    with pytest.raises(CorruptError) as error:
        load_adapter(tmp_path / "x.pt")
    assert "--allow-pickle" in error.value.fix


@pytest.mark.parametrize(
    "value",
    [
        {"<a>": torch.full((2, 4), float("nan"))},
        {"<a>": torch.ones(1).expand(10**6, 10**6)},
        {"<a>": torch.ones(3, 3).to_sparse()},
        {"string_to_param": {"*": 3}},
        {"string_to_param": {}},
        {"a": {"b": {"c": {"d": {"e": 1}}}}},
        [torch.ones(2, 1)],
        [torch.ones(2, 1), torch.ones(1, 2)],
        {"<a>": "text"},
        {},
        3,
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CorruptError, match=r"x\.pt"):
        load_adapter(tmp_path / "x.pt", allow_pickle=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_refused(tmp_path: Path, zipped: bool) -> None:
    torch.save({"<a>": ROWS}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "x.pt").read_bytes()
    for length in range(4, len(whole), max(1, len(whole) // 50)):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(CorruptError):
            load_adapter(tmp_path / "x.pt", allow_pickle=True)


def test_a_compressed_archive_is_no_pickle(tmp_path: Path) -> None:
    torch.save({"<a>": torch.zeros(1000, 768)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptError, match="compressed"):
        load_adapter(tmp_path / "bomb.pt", allow_pickle=True)


def test_a_view_comes_back_as_numbers_of_its_own(tmp_path: Path) -> None:
    write_pickle(tmp_path / "x.pt", {"a": torch.arange(6.0).reshape(2, 3).T, "b": [1, None, "x"]})
    value = read_pickle(tmp_path / "x.pt")
    assert value["a"].is_contiguous()
    assert value["a"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert value["b"] == [1, None, "x"]


@pytest.mark.parametrize("form", ["learned_embeds", "emb_params", "a1111"])
@pytest.mark.parametrize(
    "adapter",
    [
        Adapter({"unet.conv_in": LoraFactors(torch.ones(1, 4), torch.ones(6, 1), 1.0)}, {"<a>": ROWS}),
        Adapter({}, {"<a>": ROWS, "<b>": ROWS}),
        Adapter({}),
    ],
)
def test_an_embedding_file_holds_one_token_and_nothing_else(tmp_path: Path, form: str, adapter: Adapter) -> None:
    with pytest.raises(CorruptError):
        save(adapter, tmp_path / "x", form)
    assert not (tmp_path / "x").exists()
