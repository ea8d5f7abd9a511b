"""Raw pictures become squares of one size with captions, ready to train on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lora_pipeline.data.captions import check_caption, fill_template, read_caption
from lora_pipeline.data.dataset import write_metadata
from lora_pipeline.data.images import MASK, list_pictures, open_picture
from lora_pipeline.data.masks import check_mask, mask_beside, mask_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_pipeline.params import ConceptParams


def preprocess(raw: Path, out: Path, concept: ConceptParams, seed: int, advance: Callable[[int], None]) -> int:
    """Writes `000.png` ..., `000.mask.png` ... of those with a mask, and `metadata.jsonl`.

    The same pictures, captions and masks give the same bytes.

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
        CorruptError: A damaged picture; a caption without the placeholder or, for subjects, without the class noun; a
            mask of another size than its picture, or black where the picture is kept.
    """
    settings = concept.preprocess
    pictures = list_pictures(raw)
    captions = [caption_of(picture, concept) for picture in pictures]  # all refused before any is written
    masks: dict[str, str] = {}
    for index, picture in enumerate(pictures):
        crop_seed = f"{seed}/{picture.name}" if settings.crop == "random" else None
        whole, name = open_picture(picture), f"{index:03}.png"
        cut_square(whole, settings.resolution, crop_seed).save(out / name, format="PNG")
        if path := mask_beside(picture):
            mask = cut_square(mask_for(path, whole.size), settings.resolution, crop_seed, Image.Resampling.BOX)
            check_mask(path, mask)
            masks[name] = f"{index:03}{MASK}"
            mask.save(out / masks[name], format="PNG")
        advance(index + 1)
    names = [f"{index:03}.png" for index in range(len(pictures))]
    sources = dict(zip(names, (picture.name for picture in pictures), strict=True))
    write_metadata(out, dict(zip(names, captions, strict=True)), masks, sources)
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


def cut_square(
    picture: Image.Image,
    resolution: int,
    crop_seed: str | None,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Scales the short side to `resolution` and cuts a square out of the long one.

    Args:
        picture: RGB, or a mask.
        resolution: Pixels a side.
        crop_seed: Where along the long side is drawn from it; None is the middle.
        resampling: Lanczos keeps pictures sharp; a mask's edges are not to overshoot.

    Returns:
        (resolution, resolution) of the picture's mode, without any metadata of the original.
    """
    width, height = picture.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != picture.size:
        picture = picture.resize(size, resampling)
    share = 0.5 if crop_seed is None else random.Random(crop_seed).random()
    left, top = (round((side - resolution) * share) for side in size)
    square = Image.new(picture.mode, (resolution, resolution))
    square.paste(picture.crop((left, top, left + resolution, top + resolution)))
    return square
