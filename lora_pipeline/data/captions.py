"""Captions: written beside each picture, or filled into a template."""

from __future__ import annotations

import re
from pathlib import Path

from lora_pipeline.errors import CorruptError, MissingError


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
