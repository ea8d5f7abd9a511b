"""What a toy picture can show: the world's vocabulary, and random scenes drawn from it.

A scene is data only (`Thing`s on a background in a style); `drawing` makes the picture and `captions` the words. All
lengths are pixels of a 64 x 64 picture, angles are degrees. The two mascots and the `sticker` style are held out: no
random scene of `random_scene` shows them, so the base has never painted them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SIDE = 64

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = {
    "red": (221, 45, 45),
    "orange": (247, 140, 30),
    "yellow": (250, 214, 50),
    "green": (45, 168, 72),
    "blue": (45, 95, 220),
    "purple": (145, 55, 185),
    "white": (246, 244, 250),
    "black": (24, 22, 28),
}
PINK = (222, 45, 150)  # no colour of the world: only the second mascot wears it
SCENERY = ("beach", "snow", "meadow", "night")
BACKGROUNDS = (*COLOURS, *SCENERY)
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": 11.0, "medium": 16.0, "large": 22.0}
STYLES = ("flat", "outline", "pixelated", "shaded")
HELD_OUT_STYLE = "sticker"
RELATIONS = ("left of", "above")

# A thing that would vanish into its background is never asked for.
CAMOUFLAGE = {("white", "snow"), ("black", "night"), ("green", "meadow"), *((c, c) for c in COLOURS)}


@dataclass(frozen=True)
class Anatomy:
    """The parts a creature is put together from."""

    body: str  # round | square | egg
    ears: str  # pointed | antenna | long | round
    eyes: int


CREATURES = {
    "cat": Anatomy("round", "pointed", 2),
    "robot": Anatomy("square", "antenna", 2),
    "bunny": Anatomy("egg", "long", 2),
}
KINDS = (*SHAPES, *CREATURES)

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object. `bottom` and `ear` colours make it two-tone; plain creatures wear one colour all over."""

    kind: str
    colour: str
    top: Rgb
    bottom: Rgb
    ear: Rgb
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    anatomy: Anatomy | None = None


@dataclass(frozen=True)
class Scene:
    """What one picture shows. With two things, the first is `relation` the second."""

    things: tuple[Thing, ...]
    background: str
    style: str
    relation: str | None = None


@dataclass(frozen=True)
class Mascot:
    """A held-out composite creature."""

    name: str
    anatomy: Anatomy
    top: Rgb
    bottom: Rgb
    ear: Rgb


MASCOTS = {
    "zorp": Mascot("zorp", Anatomy("round", "pointed", 2), COLOURS["orange"], COLOURS["blue"], COLOURS["blue"]),
    "mimo": Mascot("mimo", Anatomy("square", "round", 1), COLOURS["white"], PINK, PINK),
}


def pick(rng: np.random.Generator, options: object, weights: list[float] | None = None) -> str:
    """One of `options` (any iterable of strings), uniformly or by `weights` summing to 1."""
    names = list(options)  # type: ignore[call-overload]
    return str(names[int(rng.choice(len(names), p=weights))])


def shade(rng: np.random.Generator, colour: Rgb) -> Rgb:
    """`colour` moved by up to 8 levels a channel, so that a colour is a region and not a point."""
    red, green, blue = (int(np.clip(c + rng.integers(-8, 9), 0, 255)) for c in colour)
    return red, green, blue


def visible_colours(background: str, taken: tuple[str, ...] = ()) -> list[str]:
    """Colours that stand out on `background` and are not `taken` already."""
    return [c for c in COLOURS if (c, background) not in CAMOUFLAGE and c not in taken]


def place(rng: np.random.Generator, size: str) -> tuple[float, float, float, float]:
    """x, y, radius, angle of a lone thing: around the middle, whole inside the picture."""
    radius = SIZES[size] * rng.uniform(0.92, 1.08)
    room = max(0.0, 28.0 - 1.25 * radius)
    x, y = 32 + rng.uniform(-room, room), 34 + rng.uniform(-room, room)
    return x, y, radius, float(rng.uniform(-10, 10))


def random_thing(rng: np.random.Generator, background: str, style: str, kind: str | None = None) -> Thing:
    """A lone thing that stands out on `background` and that `style` can show; a random kind unless given."""
    kind = kind or pick(rng, KINDS)
    # Blocks of four pixels swallow small things, and textures live below the resolution of either style.
    size = pick(rng, ("medium", "large") if style == "pixelated" else SIZES)
    coarse = style in ("pixelated", "outline")
    texture = "plain" if coarse else pick(rng, TEXTURES, [0.6, 0.2, 0.2])
    colour = pick(rng, visible_colours(background))
    x, y, radius, angle = place(rng, size)
    paint = shade(rng, COLOURS[colour])
    return Thing(kind, colour, paint, paint, paint, texture, size, x, y, radius, angle, CREATURES.get(kind))


def random_pair(rng: np.random.Generator, background: str, relation: str) -> tuple[Thing, Thing]:
    """Two small plain things of different colours, the first `relation` the second, a clear gap between them."""
    colours: tuple[str, ...] = ()
    things = []
    for side in (-1, 1):
        colour = pick(rng, visible_colours(background, colours))
        colours = (*colours, colour)
        kind, paint = pick(rng, KINDS), shade(rng, COLOURS[colour])
        radius = 10.5 * rng.uniform(0.95, 1.08)
        along, across = 32 + side * (15.5 + rng.uniform(-1, 1)), 33 + rng.uniform(-5, 5)
        x, y = (along, across) if relation == "left of" else (across, along + 1)
        angle = float(rng.uniform(-8, 8))
        things.append(
            Thing(kind, colour, paint, paint, paint, "plain", "small", x, y, radius, angle, CREATURES.get(kind))
        )
    return things[0], things[1]


def random_background(rng: np.random.Generator) -> str:
    """A plain colour six times out of ten, else scenery."""
    return pick(rng, COLOURS) if rng.random() < 0.6 else pick(rng, SCENERY)


def random_scene(rng: np.random.Generator, pairs: float = 0.3) -> Scene:
    """A scene of the base's world; `pairs` is the share of two-object scenes."""
    background = random_background(rng)
    if rng.random() < pairs:
        style = pick(rng, ("flat", "outline", "shaded"), [0.5, 0.25, 0.25])
        relation = pick(rng, RELATIONS)
        return Scene(random_pair(rng, background, relation), background, style, relation)
    style = pick(rng, STYLES, [0.4, 0.2, 0.2, 0.2])
    return Scene((random_thing(rng, background, style),), background, style)


def mascot_scene(rng: np.random.Generator, name: str, background: str | None = None, size: str | None = None) -> Scene:
    """The held-out subject `name` in the flat style."""
    mascot = MASCOTS[name]
    x, y, radius, angle = place(rng, size or pick(rng, ("medium", "large")))
    thing = Thing(
        "creature", "composite", mascot.top, mascot.bottom, mascot.ear, "plain", size or "medium",
        x, y, radius, angle, mascot.anatomy,
    )  # fmt: skip
    return Scene((thing,), background or random_background(rng), "flat")


def composite_scene(rng: np.random.Generator) -> Scene:
    """A creature of random parts and colours in any style, the held-out one included.

    For the autoencoder and the judge, which must be able to show and to tell apart what the base has never painted.
    """
    background = random_background(rng)
    style = pick(rng, (*STYLES, HELD_OUT_STYLE))
    thing = random_thing(rng, background, style, kind=pick(rng, CREATURES))
    palette = [*COLOURS.values(), PINK]
    top, bottom, ear = (shade(rng, palette[int(rng.integers(len(palette)))]) for _ in range(3))
    anatomy = Anatomy(
        pick(rng, ("round", "square", "egg")),
        pick(rng, ("pointed", "antenna", "long", "round")),
        int(rng.integers(1, 4)),
    )
    thing = replace(
        thing, kind="creature", colour="composite", top=top, bottom=bottom, ear=ear, anatomy=anatomy, texture="plain"
    )
    return Scene((thing,), background, style)


def restyled(scene: Scene, style: str) -> Scene:
    """The same scene drawn in another style."""
    return replace(scene, style=style)
