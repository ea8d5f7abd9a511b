"""Encodings on disk: never wrong, whatever lies there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_pipeline.training.cache import TensorCache, fingerprint, key_of

TRUE = {"mean": torch.arange(6.0).reshape(2, 3), "deviation": torch.ones(2)}


def asked(cache: TensorCache, key: str) -> tuple[bool, bool]:
    """Whether it was known, and whether it is right."""
    found, known = cache.get(lambda: key, lambda: TRUE)
    right = found.keys() == TRUE.keys() and all(torch.equal(found[name], TRUE[name]) for name in TRUE)
    return known, right


def entry(folder: Path, key: str) -> Path:
    [path] = folder.rglob(f"{key}.safetensors")
    return path


def test_what_was_computed_is_known_next_time(tmp_path: Path) -> None:
    first, second = TensorCache(tmp_path), TensorCache(tmp_path)
    assert asked(first, "ab") == (False, True)
    assert asked(second, "ab") == (True, True)
    assert asked(second, "cd") == (False, True)
    assert not list(tmp_path.rglob(".*"))


def flip_a_value(path: Path, foreign: Path) -> None:
    del foreign
    contents = bytearray(path.read_bytes())
    contents[-2] ^= 1
    path.write_bytes(contents)


def cut_short(path: Path, foreign: Path) -> None:
    del foreign
    path.write_bytes(path.read_bytes()[:-4])


def put_another(path: Path, foreign: Path) -> None:
    shutil.copyfile(foreign, path)


def put_a_folder(path: Path, foreign: Path) -> None:
    del foreign
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip_a_value, cut_short, put_another])
def test_damaged_and_foreign_entries_are_computed_and_written_again(tmp_path: Path, damage: object) -> None:
    cache = TensorCache(tmp_path)
    cache.get(lambda: "ff", lambda: {"mean": torch.zeros(2, 3), "deviation": torch.ones(2)})
    asked(cache, "ab")
    assert callable(damage)
    damage(entry(tmp_path, "ab"), entry(tmp_path, "ff"))
    assert asked(cache, "ab") == (False, True)
    assert asked(cache, "ab") == (True, True)


def test_a_place_that_cannot_be_written_costs_the_memory_alone(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    asked(cache, "ab")
    put_a_folder(entry(tmp_path, "ab"), tmp_path)
    (tmp_path / "file").write_text("")
    for broken in (cache, TensorCache(tmp_path / "file")):
        assert asked(broken, "ab") == asked(broken, "ab") == (False, True)


def test_those_unused_for_longest_go_first(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    for age, key in enumerate(("new", "old", "older")):
        asked(cache, key)
        os.utime(entry(tmp_path, key), (1000 - age, 1000 - age))
    size = entry(tmp_path, "old").stat().st_size
    asked(cache, "older")  # is in use again
    TensorCache(tmp_path, limit=2 * size + 10).shrink()
    assert sorted(path.stem for path in tmp_path.rglob("*.safetensors")) == ["new", "older"]


def test_without_a_folder_nothing_is_kept_and_no_key_is_made() -> None:
    def key() -> str:
        raise AssertionError

    assert TensorCache(None).get(key, lambda: TRUE) == (TRUE, False)


@pytest.mark.parametrize(
    "other",
    [("pictures", torch.zeros(3, 2)), ("pictures", torch.ones(2, 3)), ("picture", "s", torch.zeros(2, 3)),
     ("pictures", torch.zeros(2, 3).double())],
)  # fmt: skip
def test_keys_tell_apart_what_differs(other: tuple[str | Tensor, ...]) -> None:
    assert key_of("pictures", torch.zeros(2, 3)) == key_of("pictures", torch.zeros(2, 3))
    assert key_of("pictures", torch.zeros(2, 3)) != key_of(*other)


def test_one_weight_changes_a_fingerprint() -> None:
    model = nn.Linear(3, 2)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.bias[1] += 1e-6
    assert fingerprint(model) != before
