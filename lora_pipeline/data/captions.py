"""Captions: written beside each picture, or filled into a template."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lora_pipeline.errors import CorruptError, MissingError

if TYPE_CHECKING:
    import torch


def read_caption(picture: Path) -> str:
    """The text of the `.txt` beside a picture, on one line.

    Raises:
        MissingError: There is none.
        CorruptError: It is empty, or not UTF-8.
    """
    path = picture.with_suffix(".txt")
    if not path.is_file():
        fix = f"write {path.name} beside it, or set preprocess.captions to template"
        raise MissingError(str(picture), "has no caption beside it", fix)
    try:
        caption = " ".join(path.read_text("utf-8-sig").split())
    except UnicodeDecodeError:
        raise CorruptError(str(path), "is not UTF-8 text", "save it as UTF-8") from None
    if not caption:
        raise CorruptError(str(path), "is empty", "say in it what the picture shows")
    return caption


def fill_template(template: str, token: str | None, noun: str) -> str:
    """Writes token and noun into a template; a concept without a token leaves no gap.

    Args:
        template: With `{token}` and `{noun}` where they belong.
        token: The placeholder, or None.
        noun: The class noun.
    """
    return " ".join(template.replace("{token}", token or "").replace("{noun}", noun).split())


def check_caption(where: str, caption: str, token: str | None, noun: str | None) -> None:
    """Refuses a caption without the words that carry the concept.

    Args:
        where: The file or key to name in the error.
        caption: What is checked, whatever its case.
        token: The placeholder it must hold, or None.
        noun: The word or words it must hold, or None.

    Raises:
        CorruptError: One of them is missing.
    """
    for name, word in (("placeholder token", token), ("class noun", noun)):
        if word and not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, flags=re.IGNORECASE):
            problem = f"the caption {caption!r} lacks the {name} {word!r}"
            raise CorruptError(where, problem, f"write {word!r} into it, where the concept is named")


def tags_of(caption: str) -> list[str]:
    """The parts of a caption between commas, without the empty ones."""
    return [part for part in (part.strip() for part in caption.split(",")) if part]


def orders_of(caption: str, kept: int) -> int:
    """How many captions `shuffled` makes of one."""
    return math.factorial(max(len(tags_of(caption)) - kept, 0))


def shuffled(caption: str, kept: int, generator: torch.Generator) -> str:
    """The parts between commas in another order; a placeholder stays whole, as parts do.

    Args:
        caption: What is shown; one with nothing to move comes back as it is.
        kept: How many parts at the front stay there.
        generator: One draw is taken of it, if there is something to move.
    """
    import torch

    if orders_of(caption, kept) == 1:
        return caption
    tags = tags_of(caption)
    order = torch.randperm(len(tags) - kept, generator=generator).tolist()
    return ", ".join([*tags[:kept], *(tags[kept + place] for place in order)])
