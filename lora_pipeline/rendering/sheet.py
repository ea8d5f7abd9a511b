"""Many pictures on one, in rows and columns with labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALLEST, _LARGEST = 128, 384  # sides of a tile in pixels
_GAP, _TEXT_SIZE, _ROW_LABEL_WIDTH = 6, 15, 200
_LINE = _TEXT_SIZE + 4

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(images: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """Lays out pictures, row by row, with labels on the left and on top.

    Args:
        images: uint8 (rows * columns, height, width, 3). Small ones are enlarged by a whole factor to at least 128
            pixels, so that their own pixels show; large ones are reduced to 384.
        row_labels: Such as prompts; wrapped.
        column_labels: Such as seeds; wrapped.

    Raises:
        ValueError: The number of images is not rows times columns, or is none.
    """
    rows, columns = len(row_labels), len(column_labels)
    if rows * columns != len(images) or not len(images):
        raise ValueError(f"{len(images)} images are no {rows} rows of {columns}")
    font = ImageFont.load_default(_TEXT_SIZE)
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    left = [_wrapped(label, font, _ROW_LABEL_WIDTH) for label in row_labels]
    top = [_wrapped(label, font, width) for label in column_labels]
    bands = [max(height, _LINE * len(lines)) + _GAP for lines in left]
    head = _LINE * max(map(len, top)) + 2 * _GAP
    margin = _ROW_LABEL_WIDTH + 2 * _GAP
    sheet = Image.new("RGB", (margin + columns * (width + _GAP), head + sum(bands)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(top):
        _write(pen, (margin + column * (width + _GAP), _GAP), lines, font)
    for row, lines in enumerate(left):
        down = head + sum(bands[:row])
        _write(pen, (_GAP, down), lines, font)
        for column in range(columns):
            sheet.paste(tiles[row * columns + column], (margin + column * (width + _GAP), down))
    return sheet


def _tile(image: np.ndarray) -> Image.Image:
    tile = Image.fromarray(image)
    if max(tile.size) > _LARGEST:
        tile.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BOX)
        return tile
    factor = math.ceil(_SMALLEST / min(tile.size))
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines no wider than `width`, broken at blanks, or inside a word that is too long by itself."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font: Font) -> None:
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * _LINE), line, fill="black", font=font)
