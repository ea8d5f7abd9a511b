"""A folder of pictures with `metadata.jsonl`, the layout of Hugging Face's imagefolder.

A line is {file_name, text}, with `mask_file_name` where the picture has a mask, and `source`, the name its file had
before preprocessing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_pipeline.data.images import open_picture, picture_size
from lora_pipeline.errors import CorruptError, MissingError

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Example:
    """A picture, what it shows, and perhaps a mask of where the concept is in it, and the name its file had before."""

    image: Path
    caption: str
    mask: Path | None = None
    source: str | None = None

    @property
    def name(self) -> str:
        """The name a user knows it by."""
        return self.source or self.image.name


def write_metadata(
    folder: Path,
    captions: Mapping[str, str],
    masks: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Writes `metadata.jsonl`, sorted by file name.

    Args:
        folder: Where the pictures are.
        captions: By file name, without folders.
        masks: File names of masks in the same folder, by the picture's.
        sources: The names the files had before, by file name.
    """
    rows = []
    for name in sorted(captions):
        mask = {"mask_file_name": masks[name]} if masks and name in masks else {}
        source = {"source": sources[name]} if sources and name in sources else {}
        rows.append(json.dumps({"file_name": name, "text": captions[name]} | mask | source, ensure_ascii=False))
    (folder / METADATA).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def read_examples(folder: Path) -> tuple[Example, ...]:
    """The folder's examples, sorted by file name; none if its metadata is empty.

    Raises:
        MissingError: No metadata, or a picture or mask it names is not there.
        CorruptError: A line that is not `{"file_name": ..., "text": ...}`, or a name twice or outside the folder.
    """
    path = folder / METADATA
    if not path.is_file():
        raise MissingError(str(path), "no such file", "run the stage that makes it, such as lora-pipe preprocess")
    examples: dict[str, Example] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        where = f"{path}:{number}"
        name, caption, mask, source = _row(where, line)
        if name in examples:
            raise CorruptError(where, f"{name!r} is there twice", "make it again")
        masked = None if mask is None else _inside(where, folder, mask)
        examples[name] = Example(_inside(where, folder, name), caption, masked, source)
    return tuple(examples[name] for name in sorted(examples))


def size_of(example: Example) -> tuple[int, int]:
    """Width and height of a picture.

    Raises:
        CorruptError: It cannot be read, or a side is no multiple of 8, which latents could not stand for.
    """
    width, height = picture_size(example.image)
    if width % 8 or height % 8:
        problem = f"is {width} x {height}, and sides must be multiples of 8"
        raise CorruptError(str(example.image), problem, "make the pictures again: lora-pipe preprocess")
    return width, height


def load_pixels(examples: Sequence[Example], mirrored: bool = False) -> Tensor:
    """The examples' pictures, (n, 3, height, width) float32 in [-1, 1].

    Args:
        examples: Pictures of one size.
        mirrored: Whether left and right are exchanged.

    Raises:
        CorruptError: A picture cannot be read, or is of another size than the first.
    """
    import numpy as np
    import torch

    pictures = [open_picture(example.image) for example in examples]
    for example, picture in zip(examples, pictures, strict=True):
        if picture.size != pictures[0].size:
            sizes = [f"{width} x {height}" for width, height in (picture.size, pictures[0].size)]
            problem = f"is {sizes[0]}, the others {sizes[1]}"
            raise CorruptError(str(example.image), problem, "make the pictures again with one preprocess.resolution")
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    if mirrored:
        pixels = pixels.flip(2)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def content_hash(examples: Sequence[Example]) -> str:
    """Sha-256 over names, captions and the bytes of pictures and masks."""
    total = hashlib.sha256()
    for example in examples:
        contents = hashlib.sha256(example.image.read_bytes()).hexdigest()
        if example.mask is not None:
            contents += f" {hashlib.sha256(example.mask.read_bytes()).hexdigest()}"
        total.update(f"{json.dumps([example.image.name, example.caption])} {contents}\n".encode())
    return total.hexdigest()


def _row(where: str, line: str) -> tuple[str, str, str | None, str | None]:
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row["text"]
        mask, source = row.get("mask_file_name"), row.get("source")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        name = caption = mask = source = None
    texts = isinstance(name, str) and isinstance(caption, str)
    if not (texts and isinstance(mask, str | None) and isinstance(source, str | None)):
        raise CorruptError(where, "is no {file_name, text} line", "run the stage that makes it again")
    return name, caption, mask, source


def _inside(where: str, folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise CorruptError(where, f"{name!r} is outside the folder", "make it again")
    if not (folder / name).is_file():
        raise MissingError(str(folder / name), "no such picture", "run the stage that makes it again")
    return folder / name
