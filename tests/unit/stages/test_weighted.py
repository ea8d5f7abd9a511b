"""Adapters on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_pipeline.errors import UsageError
from stages._weighted import named, parse_blocks, parse_named, parse_weighted


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors=0.7", "a.safetensors", 0.7),
        ("a.safetensors=-1", "a.safetensors", -1.0),
        ("run=3/a.safetensors=1e-1", "run=3/a.safetensors", 0.1),
    ],
)
def test_a_file_may_carry_a_weight(text: str, path: str, weight: float) -> None:
    assert parse_weighted([text]) == [(Path(path), weight)]


def test_a_file_with_an_equals_sign_in_its_name_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "a=1.safetensors"
    path.touch()
    assert parse_weighted([str(path)]) == [(path, 1.0)]


@pytest.mark.parametrize("text", ["a.safetensors=much", "a.safetensors=", "a.safetensors=nan", "a.safetensors=inf"])
def test_a_weight_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="number"):
        parse_weighted([text])


def test_named_adapters_come_in_the_names_order() -> None:
    expected = [(Path("x/a.safetensors"), 2.0), (Path("x/b.safetensors"), 1.0)]
    assert named(Path("x"), {"b": 1.0, "a": 2.0}) == expected


def test_adapters_may_be_named_with_a_number_or_with_blocks() -> None:
    assert parse_named(["zorp=0.5", "a=b=-1"]) == {"zorp": 0.5, "a=b": -1.0}
    assert parse_blocks(["zorp=IN04:0.5,*attn2*:0,M00:-1", "sticker=1,0,0.5"]) == {
        "zorp": {"IN04": 0.5, "*attn2*": 0.0, "M00": -1.0},
        "sticker": [1.0, 0.0, 0.5],
    }


@pytest.mark.parametrize("text", ["zorp", "=1", "zorp=IN04:much", "zorp=1,,1", "zorp=1,nan", "zorp="])
def test_blocks_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_blocks([text])


def test_an_adapter_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="second for zorp"):
        parse_named(["zorp=1", "zorp=2"])
