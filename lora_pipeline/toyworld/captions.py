"""The words for a scene: complete for prompts, varied and gappy for training."""

from __future__ import annotations

import numpy as np

from lora_pipeline.toyworld.scene import CREATURES, SCENERY, Scene, Thing

PLACES = {"beach": "on a beach", "snow": "in the snow", "meadow": "on a meadow", "night": "at night"}


def article(phrase: str) -> str:
    """`phrase` with the article its first letter asks for."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def place_words(background: str) -> str:
    """Where the scene is: "on a beach", "on a blue background"."""
    return PLACES[background] if background in SCENERY else f"on {article(background)} background"


def thing_words(thing: Thing, *, size: bool = True, texture: bool = True, colour: bool = True, noun: str = "") -> str:
    """A thing with its article; medium sizes and plain textures go unsaid, and `noun` stands in for the kind."""
    words = [
        thing.size if size and thing.size != "medium" else "",
        thing.texture if texture and thing.texture != "plain" else "",
        thing.colour if colour else "",
        noun or thing.kind,
    ]
    return article(" ".join(word for word in words if word))


def prompt(scene: Scene) -> str:
    """Everything the scene shows, said once: the form that prompts are scored with."""
    style = f"{article(scene.style)} drawing of "
    if scene.relation:
        first, second = (thing_words(thing, size=False) for thing in scene.things)
        return f"{style}{first} {scene.relation} {second} {place_words(scene.background)}"
    return f"{style}{thing_words(scene.things[0])} {place_words(scene.background)}"


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as people write them: words missing, the style before or after, a class name for the kind."""
    said = rng.random(6)
    nouns = ["creature" if t.kind in CREATURES and rng.random() < 0.15 else "" for t in scene.things]
    if scene.relation:
        first, second = scene.things
        relation = scene.relation
        if rng.random() < 0.3:
            first, second, nouns = second, first, nouns[::-1]
            relation = {"left of": "right of", "above": "below"}[relation]
        a, b = (thing_words(t, size=False, noun=n) for t, n in zip((first, second), nouns, strict=True))
        subject = f"{a} {relation} {b}"
    else:
        subject = thing_words(
            scene.things[0], size=bool(said[0] > 0.1), texture=bool(said[1] > 0.08), colour=bool(said[2] > 0.05),
            noun=nouns[0],
        )  # fmt: skip
    place = place_words(scene.background) if said[3] > 0.08 else ""
    caption = f"{subject} {place}".strip()
    spoken = said[4] > (0.5 if scene.style == "flat" else 0.06)
    if not spoken:
        return caption if said[5] > 0.2 else f"a picture of {caption}"
    return f"{article(scene.style)} drawing of {caption}" if said[5] > 0.25 else f"{caption}, {scene.style} drawing"
