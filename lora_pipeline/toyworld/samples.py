"""The sample project's raw pictures: two mascots and a style, five pictures each, captioned as a user would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lora_pipeline.toyworld.captions import place_words, thing_words
from lora_pipeline.toyworld.drawing import draw
from lora_pipeline.toyworld.scene import COLOURS, CREATURES, HELD_OUT_STYLE, Scene, Thing, mascot_scene, place

SEED = 2024

# The mascot, and for each picture its background and size.
PORTRAITS = {
    "zorp": (("yellow", "large"), ("meadow", "medium"), ("white", "large"), ("snow", "large"), ("purple", "medium")),
    "mimo": (("blue", "large"), ("beach", "medium"), ("green", "large"), ("night", "large"), ("orange", "medium")),
}
# Kind, colour, background and size.
STICKERS = (
    ("star", "red", "meadow", "large"),
    ("cat", "green", "blue", "large"),
    ("heart", "purple", "yellow", "medium"),
    ("robot", "orange", "night", "large"),
    ("circle", "blue", "red", "large"),
)

Sample = tuple[Image.Image, str]


def mascot_samples(name: str) -> Iterator[Sample]:
    """Pictures of a mascot with their captions."""
    for index, (background, size) in enumerate(PORTRAITS[name]):
        rng = np.random.default_rng([SEED, list(PORTRAITS).index(name), index])
        scene = mascot_scene(rng, name, background, size)
        yield draw(scene, rng), f"a <{name}> creature {place_words(background)}"


def sticker_samples() -> Iterator[Sample]:
    """Known things in the style the base has never painted, with their captions."""
    for index, (kind, colour, background, size) in enumerate(STICKERS):
        rng = np.random.default_rng([SEED, len(PORTRAITS), index])
        paint, spot = COLOURS[colour], place(rng, size)
        thing = Thing(kind, colour, paint, paint, paint, "plain", size, *spot, CREATURES.get(kind))
        scene = Scene((thing,), background, HELD_OUT_STYLE)
        yield draw(scene, rng), f"a {HELD_OUT_STYLE} drawing of {thing_words(thing)} {place_words(background)}"


def write_samples(raw: Path) -> None:
    """Write `raw`/zorp, /mimo and /sticker: 1.png to 5.png, each with its caption beside it in a .txt."""
    concepts = {name: mascot_samples(name) for name in PORTRAITS} | {HELD_OUT_STYLE: sticker_samples()}
    for concept, samples in concepts.items():
        folder = raw / concept
        folder.mkdir(parents=True, exist_ok=True)
        for number, (picture, caption) in enumerate(samples, start=1):
            picture.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(caption + "\n")
