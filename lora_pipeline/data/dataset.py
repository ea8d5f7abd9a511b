"""A folder of pictures with `metadata.jsonl` (file_name, text), the layout of Hugging Face's imagefolder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_pipeline.data.images import open_picture
from lora_pipeline.errors import CorruptError, MissingError

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Example:
    """A picture and what it shows."""

    image: Path
    caption: str


def write_metadata(folder: Path, captions: Mapping[str, str]) -> None:
    """Writes `metadata.jsonl`, sorted by file name.

    Args:
        folder: Where the pictures are.
        captions: By file name, without folders.
    """
    rows = [json.dumps({"file_name": name, "text": captions[name]}, ensure_ascii=False) for name in sorted(captions)]
    (folder / METADATA).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def read_examples(folder: Path) -> tuple[Example, ...]:
    """The folder's examples, sorted by file name; none if its metadata is empty.

    Raises:
        MissingError: No metadata, or a picture it names is not there.
        CorruptError: A line that is not `{"file_name": ..., "text": ...}`, or a name twice or outside the folder.
    """
    path = folder / METADATA
    if not path.is_file():
        raise MissingError(str(path), "no such file", "run the stage that makes it, such as lora-pipe preprocess")
    captions: dict[str, str] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        name, caption = _row(f"{path}:{number}", line)
        if name in captions or Path(name).name != name:
            raise CorruptError(f"{path}:{number}", f"{name!r} is there twice or outside the folder", "make it again")
        if not (folder / name).is_file():
            raise MissingError(str(folder / name), "no such picture", "run the stage that makes it again")
        captions[name] = caption
    return tuple(Example(folder / name, captions[name]) for name in sorted(captions))


def load_pixels(examples: Sequence[Example]) -> Tensor:
    """The examples' pictures, (n, 3, height, width) float32 in [-1, 1].

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
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def content_hash(examples: Sequence[Example]) -> str:
    """Sha-256 over names, captions and picture bytes."""
    total = hashlib.sha256()
    for example in examples:
        contents = hashlib.sha256(example.image.read_bytes()).hexdigest()
        total.update(f"{json.dumps([example.image.name, example.caption])} {contents}\n".encode())
    return total.hexdigest()


def _row(where: str, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = caption = None
    if not isinstance(name, str) or not isinstance(caption, str):
        raise CorruptError(where, "is no {file_name, text} line", "run the stage that makes it again")
    return name, caption
