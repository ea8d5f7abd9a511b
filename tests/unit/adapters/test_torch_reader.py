"""`.ckpt` files as torch writes them, read by place."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_pipeline.adapters.checkpoints.torch_reader import read_contents
from lora_pipeline.adapters.storage import read_tensor, write_tensors
from lora_pipeline.errors import CorruptError, MissingError

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


class Callback:
    """What a trainer saves beside its weights."""

    def __init__(self) -> None:
        self.best = 0.5


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def read(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        return {name: read_tensor(file, entry) for name, entry in read_contents(path).tensors.items()}


def tensors() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    made = {str(dtype): (10 * torch.randn(3, 4, generator=source)).to(dtype) for dtype in DTYPES}
    whole = torch.randn(6, 4, generator=source)
    return {
        **made, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "rows": whole[2:4], "again": whole,
        "one": torch.randn(1, 5, 1, 1, generator=source), "parameter": nn.Parameter(torch.ones(2)),
    }  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_are_those_that_torch_saved(tmp_path: Path, nested: bool) -> None:
    expected = tensors()
    state: Any = OrderedDict(expected)
    torch.save(
        {"state_dict": state, "epoch": 3, "callbacks": {Callback: Callback()}} if nested else state, tmp_path / "x"
    )
    found = read(tmp_path / "x")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_nothing_that_a_pickle_names_is_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "attack": Attack(tmp_path / "made")}, tmp_path / "x.ckpt")
    assert torch.equal(read(tmp_path / "x.ckpt")["a"], torch.ones(2))
    assert not (tmp_path / "made").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.ckpt", weights_only=True)


def test_a_safetensors_file_is_read_as_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.ones(2)}, {"format": "pt"})
    assert read_contents(tmp_path / "x").metadata == {"format": "pt"}


def rewritten(path: Path, edit: Any) -> None:
    """The archive with its members changed by `edit(name, data)`; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if (changed := edit(name, data)) is not None:
                archive.writestr(name, changed)


def is_pickle(name: str) -> bool:
    return name.endswith("data.pkl")


EDITS: dict[str, Any] = {
    "lacks its member": lambda name, data: None if "/data/" in name else data,
    "larger than its storage": lambda name, data: data[:-4] if "/data/" in name else data,
    "byte order": lambda name, data: b"big" if "byteorder" in name else data,
    "no pickle of tensors": lambda name, data: b"\x80\x02garbage" if is_pickle(name) else data,
    r"no pickle of tensors \(": lambda name, data: b"\x80\x02" + b"(" * 10_000 if is_pickle(name) else data,
}


@pytest.mark.parametrize("said", EDITS)
def test_an_archive_that_was_tampered_with_is_refused(tmp_path: Path, said: str) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / "x.ckpt")
    rewritten(tmp_path / "x.ckpt", EDITS[said])
    refused(tmp_path / "x.ckpt", said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": 1}, "no tensors by name"),
        ([torch.ones(2)], "no tensors by name"),
        ({"a": torch.ones(4, 4).T[1:]}, "one piece"),
        ({"a": torch.ones(1).expand(1000)}, "one piece"),
    ],
)
def test_what_is_no_dictionary_of_whole_tensors_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    torch.save(value, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", said)


def test_a_truncated_archive_and_a_bare_pickle_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / "x.ckpt")
    whole = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(whole[:-40])
    refused(tmp_path / "x.ckpt", "damaged archive")
    torch.save({"a": torch.ones(64)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "x.ckpt", r"before 1\.6")


def refused(path: Path, said: str) -> None:
    with pytest.raises(CorruptError, match=said) as caught:
        read_contents(path)
    assert "x.ckpt" in caught.value.where


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        read_contents(tmp_path / "x.ckpt")
    with pytest.raises(CorruptError):
        read_contents(tmp_path)
