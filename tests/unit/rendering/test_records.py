from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_pipeline.errors import CorruptError, MissingError
from lora_pipeline.rendering.records import MAX_RECIPE_BYTES, read_recipe, write_picture

PICTURE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
SIGNATURE = b"\x89PNG\r\n\x1a\n"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text(content: bytes) -> bytes:
    return chunk(b"tEXt", b"lora_pipeline\0" + content)


PIXELS = chunk(b"IDAT", b"")


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), VALUES, max_size=4))
def test_recipe_and_pixels_come_back(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, object]) -> None:
    path = tmp_path_factory.mktemp("records") / "a.png"
    write_picture(path, PICTURE, recipe)  # type: ignore[arg-type]  # hypothesis cannot name JSON
    assert read_recipe(path) == recipe
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), PICTURE)


def test_the_order_of_a_recipe_does_not_reach_the_bytes(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", PICTURE, {"a": 1, "b": 2})
    write_picture(tmp_path / "b.png", PICTURE, {"b": 2, "a": 1})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pillow_finds_exactly_one_text(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", PICTURE, {"b": "ü", "a": 1})
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info == {"lora_pipeline": '{"a": 1, "b": "\\u00fc"}'}


def test_a_number_json_has_not_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_picture(tmp_path / "a.png", PICTURE, {"a": float("nan")})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no PNG"),
        (b"GIF89a" + bytes(20), "is no PNG"),
        (SIGNATURE, "truncated"),
        (SIGNATURE + struct.pack(">I", 2**31) + b"tEXt", "announces"),
        (SIGNATURE + struct.pack(">I", 2**31) + b"zTXt" + bytes(20), "truncated"),
        (SIGNATURE + chunk(b"tEXt", b"x" * (MAX_RECIPE_BYTES + 1)) + PIXELS, "announces"),
        (SIGNATURE + text(b"{}")[:-1] + b"\0" + PIXELS, "checksum"),
        (SIGNATURE + text(b"{}")[:-6], "checksum"),
        (SIGNATURE + PIXELS, "0 recipes"),
        (SIGNATURE + chunk(b"zTXt", b"lora_pipeline\0\0" + zlib.compress(b"{}")) + PIXELS, "0 recipes"),
        (SIGNATURE + PIXELS + text(b"{}"), "0 recipes"),
        (SIGNATURE + text(b"{}") * 2 + PIXELS, "2 recipes"),
        (SIGNATURE + chunk(b"vpAg", b"") * 1001, "chunks"),
        (SIGNATURE + text(b"{") + PIXELS, "not JSON"),
        (SIGNATURE + text(b'{"a": NaN}') + PIXELS, "not JSON"),
        (SIGNATURE + text(b'{"a": "\xff"}') + PIXELS, "not JSON"),
        (SIGNATURE + text(b"[" * 100_000) + PIXELS, "not JSON"),
        (SIGNATURE + text(b"[]") + PIXELS, "not a JSON object"),
    ],
)
def test_hostile_pictures_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(CorruptError, match=problem):
        read_recipe(tmp_path / "a.png")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CorruptError, match="regular"):
            read_recipe(path)
    with pytest.raises(MissingError, match="no such"):
        read_recipe(tmp_path / "a.png")
