"""A picture carries how it was made: a PNG `tEXt` chunk `lora_pipeline` of sorted JSON.

Layout of PNG: https://www.w3.org/TR/png-3/#5DataRep. The chunks are read without decoding the picture, and are trusted
in nothing.
"""

from __future__ import annotations

import json
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_pipeline.adapters.adapter import Json
from lora_pipeline.errors import CorruptError, MissingError

KEYWORD = "lora_pipeline"
MAX_RECIPE_BYTES = 1024 * 1024
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 1000  # before the pixels
_FIX = "render it again"


def write_picture(path: Path, image: np.ndarray, recipe: Mapping[str, Json]) -> None:
    """Writes a PNG: same picture, same recipe, same bytes.

    Args:
        path: The file.
        image: uint8 (height, width, 3).
        recipe: What made it; numbers in it are finite.
    """
    info = PngInfo()
    info.add_text(KEYWORD, json.dumps(recipe, sort_keys=True, allow_nan=False))
    Image.fromarray(image).save(path, format="PNG", pnginfo=info)


def read_recipe(path: Path) -> dict[str, Json]:
    """The recipe in a picture.

    Raises:
        MissingError: No such file.
        CorruptError: It is no PNG, is damaged before its pixels, or holds no recipe, several, or one that is too long.
    """
    _refuse_other_kinds(path)
    with path.open("rb") as file:
        texts = list(_recipes(path, file))
    if len(texts) != 1:
        raise CorruptError(str(path), f"holds {len(texts)} recipes, not one", "give a picture lora-pipe render made")
    try:
        recipe = json.loads(texts[0].decode("ascii"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptError(str(path), f"its recipe is not JSON: {error!r:.100}", _FIX) from None
    if not isinstance(recipe, dict):
        raise CorruptError(str(path), "its recipe is not a JSON object", _FIX)
    return recipe


def _refuse_other_kinds(path: Path) -> None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(str(path), "no such file", "check the path, or run lora-pipe render") from None
    if not stat.S_ISREG(status.st_mode):
        raise CorruptError(str(path), "is not a regular file", "give a PNG")


def _recipes(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The text of every recipe chunk in front of the pixels."""
    if file.read(8) != _SIGNATURE:
        raise CorruptError(str(path), "is no PNG", "give a picture lora-pipe render made")
    prefix = KEYWORD.encode() + b"\0"
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise CorruptError(str(path), "is truncated", _FIX)
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            return
        if kind != b"tEXt":
            file.seek(length + 4, 1)
        elif (data := _text(path, file, length)).startswith(prefix):
            yield data.removeprefix(prefix)
    raise CorruptError(str(path), f"has more than {_MAX_CHUNKS} chunks before its pixels", _FIX)


def _text(path: Path, file: BinaryIO, length: int) -> bytes:
    """The data of a tEXt chunk."""
    if length > MAX_RECIPE_BYTES:
        raise CorruptError(str(path), f"announces {length} bytes of text", _FIX)
    data, checksum = file.read(length), file.read(4)
    if checksum != struct.pack(">I", zlib.crc32(b"tEXt" + data)):
        raise CorruptError(str(path), "is damaged: a checksum does not match", _FIX)
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
