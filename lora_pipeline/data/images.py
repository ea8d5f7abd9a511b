"""Pictures as users have them: any orientation, mode and size, and not always whole."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from lora_pipeline.errors import CorruptError, MissingError

MASK = ".mask.png"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_BESIDE = {".txt", ".json", ".jsonl", ".md"}  # what may lie beside pictures
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_TOO_LARGE = (Image.DecompressionBombWarning, Image.DecompressionBombError)


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, sorted by name; hidden files, folders, text and their masks are passed over.

    Raises:
        MissingError: No such folder, or no picture in it.
        CorruptError: A file that looks like neither a picture nor text, or a mask of no picture: it would be left out
            silently.
    """
    if not folder.is_dir():
        raise MissingError(str(folder), "is no folder", "create it and put the concept's pictures there")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in files:
        if path.suffix.lower() not in SUFFIXES | _BESIDE:
            raise CorruptError(str(path), "is no picture of a known kind", "convert it to PNG, or take it out")
    masks = [path for path in files if path.name.lower().endswith(MASK)]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES and path not in masks]
    if not pictures:
        raise MissingError(str(folder), "holds no picture", "put .png, .jpg, .webp or .bmp files there")
    known = {f"{picture.stem}{MASK}" for picture in pictures}
    for path in masks:
        if path.name not in known:
            raise CorruptError(str(path), "is the mask of no picture", f"name it NAME{MASK} after one, or take it out")
    return pictures


def open_picture(path: Path) -> Image.Image:
    """Reads a picture upright, as RGB, with transparency laid over white.

    Raises:
        MissingError: No such file.
        CorruptError: Not a picture, damaged or truncated, or its header announces more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`; nothing is decoded then.
    """
    return _opened(path, "white")


def open_mask(path: Path) -> Image.Image:
    """Reads a mask upright, as grey, with transparency laid over black; errors as in `open_picture`."""
    return _opened(path, "black").convert("L")


def _opened(path: Path, background: str) -> Image.Image:
    if not path.is_file():
        raise MissingError(str(path), "no such picture", "check the folder, or run the stage that makes it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                picture.load()
                return _over(_eight_bit(ImageOps.exif_transpose(picture)), background)
    except _TOO_LARGE:
        raise CorruptError(str(path), "announces too many pixels", "shrink it, or take it out") from None
    except _DAMAGE as error:
        problem = f"cannot be read as a picture: {error!s:.100}"
        raise CorruptError(str(path), problem, "replace it with a whole copy, or take it out") from None


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as `open_picture` gives it, by its header alone.

    Raises:
        CorruptError: Not a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                on_its_side = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
                width, height = picture.size
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        problem = f"cannot be read as a picture: {error!s:.100}"
        raise CorruptError(str(path), problem, "replace it with a whole copy, or take it out") from None
    return (height, width) if on_its_side else (width, height)


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit grey is scaled; Pillow would clip it."""
    if picture.mode.startswith("I"):
        return picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return picture


def _over(picture: Image.Image, background: str) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
