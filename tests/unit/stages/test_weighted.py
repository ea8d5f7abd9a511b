"""Adapters on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_pipeline.errors import UsageError
from stages._weighted import named, parse_weighted


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
