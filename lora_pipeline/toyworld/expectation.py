"""What a prompt asks for, read from its words. Words the world does not have, `<tokens>` included, ask for nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_pipeline.toyworld.scene import COLOURS, HELD_OUT_STYLE, KINDS, SCENERY, SIZES, STYLES, TEXTURES

ANY_CREATURE = "creature"
WORD = re.compile(r"<[^>]*>|[a-z]+")
PLAIN_BACKGROUND = re.compile(rf"\b({'|'.join(COLOURS)}) background\b")
RELATION = re.compile(r"\b(left of|right of|above|below)\b")
TURNED = {"right of": "left of", "below": "above"}


@dataclass(frozen=True)
class Asked:
    """The words about one thing; None = not asked. The kind `creature` is any creature."""

    kind: str | None
    colour: str | None
    texture: str | None
    size: str | None


@dataclass(frozen=True)
class Expectation:
    """What a picture of a prompt must show. With two things, the first is `relation` (left of | above) the second."""

    things: tuple[Asked, ...]
    background: str | None
    style: str | None
    relation: str | None = None


def expectation(prompt: str) -> Expectation:
    """Read `prompt` ("an outline drawing of a red cat left of a blue star on a beach")."""
    text = prompt.lower()
    plain = PLAIN_BACKGROUND.search(text)
    words = WORD.findall(text)
    background = plain.group(1) if plain else first(words, SCENERY)
    style = first(words, (*STYLES, HELD_OUT_STYLE))
    subject = PLAIN_BACKGROUND.sub("", text)
    split = RELATION.split(subject, maxsplit=1)
    if len(split) == 1:
        return Expectation((asked(subject),), background, style)
    before, relation, after = split
    things = (asked(before), asked(after))
    if relation in TURNED:
        return Expectation(things[::-1], background, style, TURNED[relation])
    return Expectation(things, background, style, relation)


def asked(phrase: str) -> Asked:
    """What `phrase` says about one thing."""
    words = WORD.findall(phrase)
    kinds = (*KINDS, ANY_CREATURE)
    return Asked(first(words, kinds), first(words, COLOURS), first(words, TEXTURES), first(words, SIZES))


def first(words: list[str], known: object) -> str | None:
    """The first of `words` that is `known` (any container of strings)."""
    return next((word for word in words if word in known), None)  # type: ignore[operator]
