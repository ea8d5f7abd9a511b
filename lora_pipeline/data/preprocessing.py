"""Raw pictures become squares of one size with captions, ready to train on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lora_pipeline.data.captions import check_caption, fill_template, read_caption
from lora_pipeline.data.dataset import write_metadata
from lora_pipeline.data.images import list_pictures, open_picture

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_pipeline.params import ConceptParams


def preprocess(raw: Path, out: Path, concept: ConceptParams, seed: int, advance: Callable[[int], None]) -> int:
    """Writes `000.png` ... and `metadata.jsonl`; the same pictures and captions give the same bytes.

    Args:
        raw: A folder of pictures, with `.txt` captions beside them if the concept says so.
        out: An existing folder.
        concept: What is learnt, and how its pictures are cut.
        seed: Random crops are drawn from it and the picture's name.
        advance: Told how many pictures are done.

    Returns:
        How many pictures there are.

    Raises:
        MissingError: No folder, no picture, no caption.
        CorruptError: A damaged picture; a caption without the placeholder or, for subjects, without the class noun.
    """
    settings = concept.preprocess
    pictures = list_pictures(raw)
    captions = [caption_of(picture, concept) for picture in pictures]  # all refused before any is written
    for index, picture in enumerate(pictures):
        crop_seed = f"{seed}/{picture.name}" if settings.crop == "random" else None
        square = cut_square(open_picture(picture), settings.resolution, crop_seed)
        square.save(out / f"{index:03}.png", format="PNG")
        advance(index + 1)
    names = [f"{index:03}.png" for index in range(len(pictures))]
    sources = [picture.name for picture in pictures]
    write_metadata(out, dict(zip(names, captions, strict=True)), dict(zip(names, sources, strict=True)))
    return len(pictures)


def caption_of(picture: Path, concept: ConceptParams) -> str:
    """A picture's caption, checked.

    Raises:
        MissingError, CorruptError: See `preprocess`.
    """
    token, noun = concept.placeholder_token, concept.class_noun
    if concept.preprocess.captions == "files":
        where, caption = str(picture.with_suffix(".txt")), read_caption(picture)
    else:
        where, caption = "preprocess.template", fill_template(concept.preprocess.template, token, noun)
    check_caption(where, caption, token, noun if concept.kind == "subject" else None)
    return caption


def cut_square(picture: Image.Image, resolution: int, crop_seed: str | None) -> Image.Image:
    """Scales the short side to `resolution` (Lanczos) and cuts a square out of the long one.

    Args:
        picture: RGB.
        resolution: Pixels a side.
        crop_seed: Where along the long side is drawn from it; None is the middle.

    Returns:
        (resolution, resolution) RGB without any metadata of the original.
    """
    width, height = picture.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    share = 0.5 if crop_seed is None else random.Random(crop_seed).random()
    left, top = (round((side - resolution) * share) for side in size)
    square = Image.new("RGB", (resolution, resolution))
    square.paste(picture.crop((left, top, left + resolution, top + resolution)))
    return square
