"""Scenes to pictures: every part is a polygon, painted three times too large and averaged down.

Styles change how the polygons are painted, never where they are, so a style is a property of a picture that its
contents do not give away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from lora_pipeline.toyworld.scene import COLOURS, SCENERY, SIDE, Rgb, Scene, Thing

OVERSAMPLING = 3
CANVAS = SIDE * OVERSAMPLING
STROKE = 8  # canvas pixels

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Part:
    """One polygon of a thing in canvas pixels. Details (eyes, belly) are painted alike in every style."""

    points: Points
    colour: Rgb
    detail: bool = False


def ellipse(x: float, y: float, width: float, height: float, count: int = 40) -> Points:
    """A polygon of `count` points around (x, y); `width` and `height` are half axes."""
    turn = 2 * math.pi / count
    return [(x + width * math.cos(i * turn), y + height * math.sin(i * turn)) for i in range(count)]


def rounded_square(half: float, corner: float) -> Points:
    """A square reaching to `half` from (0, 0), its corners rounded by radius `corner`."""
    centre = half - corner
    points: Points = []
    for quadrant, (sx, sy) in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        for step in range(5):
            angle = math.pi / 2 * (quadrant + step / 4)
            points.append((sx * centre + corner * math.cos(angle), sy * centre + corner * math.sin(angle)))
    return points


def heart(count: int = 48) -> Points:
    """The unit heart, `count` points along a sextic curve."""
    points: Points = []
    for i in range(count):
        t = 2 * math.pi * i / count
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16.5, -y / 15.5 - 0.08))
    return points


def shape_outline(kind: str) -> Points:
    """The unit polygon of a shape: centre (0, 0), reaching to about radius 1."""
    if kind == "circle":
        return ellipse(0, 0, 0.95, 0.95)
    if kind == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if kind == "triangle":
        return [(0.0, -1.0), (0.98, 0.8), (-0.98, 0.8)]
    if kind == "star":
        radii = (1.08, 0.45)
        return [
            (radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)
        ]
    if kind == "heart":
        return heart()
    a, b = 0.34, 1.0
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


def ear_parts(ears: str, colour: Rgb) -> Iterator[Part]:
    """Both ears of a unit creature; unknown `ears` are antennae."""
    for side in (-1, 1):
        if ears == "pointed":
            yield Part([(side * 0.2, -0.62), (side * 0.85, -0.35), (side * 0.72, -1.25)], colour)
        elif ears == "round":
            yield Part(ellipse(side * 0.66, -0.72, 0.34, 0.34, 24), colour)
        elif ears == "long":
            yield Part(ellipse(side * 0.36, -1.0, 0.2, 0.55, 24), colour)
        else:
            yield Part([(side * 0.3, -0.5), (side * 0.42, -0.5), (side * 0.62, -1.1), (side * 0.48, -1.12)], colour)
            yield Part(ellipse(side * 0.57, -1.14, 0.18, 0.18, 16), colour)


def body_outline(body: str) -> Points:
    """The body of a unit creature; an unknown `body` is a rounded square."""
    if body == "round":
        return ellipse(0, 0.05, 0.95, 0.9)
    if body == "egg":
        return ellipse(0, 0.12, 0.72, 0.98)
    return [(x, y + 0.08) for x, y in rounded_square(0.85, 0.2)]


def creature_parts(thing: Thing) -> Iterator[Part]:
    """The polygons of a unit creature, back to front."""
    anatomy = thing.anatomy
    assert anatomy is not None
    yield from ear_parts(anatomy.ears, thing.ear)
    body = body_outline(anatomy.body)
    yield Part(body, thing.top)
    if thing.bottom != thing.top:
        yield Part([(x, max(y, 0.18)) for x, y in body], thing.bottom, detail=True)
    spots = {1: (0.0,), 2: (-0.34, 0.34), 3: (-0.5, 0.0, 0.5)}[anatomy.eyes]
    size = {1: 0.34, 2: 0.27, 3: 0.22}[anatomy.eyes]
    for x in spots:
        yield Part(ellipse(x, -0.22, size, size, 20), (255, 255, 255), detail=True)
        yield Part(ellipse(x, -0.2, size * 0.52, size * 0.52, 16), (15, 15, 20), detail=True)


def parts(thing: Thing) -> list[Part]:
    """The polygons of `thing`, back to front, turned and placed on the canvas."""
    unit = list(creature_parts(thing)) if thing.anatomy else [Part(shape_outline(thing.kind), thing.top)]
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    scale = thing.radius * OVERSAMPLING

    def onto_canvas(points: Points) -> Points:
        x, y = thing.x * OVERSAMPLING, thing.y * OVERSAMPLING
        return [(x + scale * (px * cos - py * sin), y + scale * (px * sin + py * cos)) for px, py in points]

    return [Part(onto_canvas(part.points), part.colour, part.detail) for part in unit]


def silhouette(thing: Thing) -> Image.Image:
    """Mode L canvas, 255 where the thing is."""
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    pen = ImageDraw.Draw(mask)
    for part in parts(thing):
        pen.polygon(part.points, fill=255)
    return mask


def scenery(name: str, rng: np.random.Generator) -> Image.Image:
    """An RGB canvas of a scenic background; `rng` places its horizon, sun and flakes."""
    sky = {"beach": (150, 215, 245), "snow": (190, 203, 224), "meadow": (135, 200, 250), "night": (16, 16, 60)}[name]
    ground = {"beach": (232, 208, 150), "snow": (244, 244, 250), "meadow": (100, 180, 70), "night": (36, 42, 52)}[name]
    picture = Image.new("RGB", (CANVAS, CANVAS), sky)
    pen = ImageDraw.Draw(picture)
    horizon = int(CANVAS * rng.uniform(0.58, 0.66))
    if name == "beach":
        pen.rectangle((0, horizon - 24, CANVAS, horizon), fill=(50, 140, 205))
    pen.rectangle((0, horizon, CANVAS, CANVAS), fill=ground)
    sun = {"beach": (255, 222, 70), "night": (240, 236, 200)}.get(name)
    if sun:
        x, y = (rng.uniform(0.78, 0.9) * CANVAS, rng.uniform(0.1, 0.16) * CANVAS)
        pen.ellipse((x - 16, y - 16, x + 16, y + 16), fill=sun)
    if name in ("snow", "night"):
        height = CANVAS if name == "snow" else horizon
        for _ in range(12):
            x, y = rng.uniform(0, CANVAS), rng.uniform(0, height)
            size = 4 if name == "snow" else 2
            pen.ellipse((x - size, y - size, x + size, y + size), fill=(255, 255, 255))
    return picture


def backdrop(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The RGB canvas behind the things: scenery, or a plain colour off by up to 10 levels a channel."""
    if scene.background in SCENERY:
        return scenery(scene.background, rng)
    level = rng.integers(-10, 11, 3)
    colour = np.clip(np.array(COLOURS[scene.background]) + level, 0, 255)
    return Image.new("RGB", (CANVAS, CANVAS), (int(colour[0]), int(colour[1]), int(colour[2])))


def contrast(colour: Rgb) -> Rgb:
    """Ink for a texture: darker than a light colour, lighter than black."""
    if sum(colour) < 150:
        return 150, 150, 158
    red, green, blue = (int(c * 0.32) for c in colour)
    return red, green, blue


def texture_mask(thing: Thing) -> Image.Image:
    """Mode L canvas, 255 where the texture has ink: stripes or dots, over the whole canvas."""
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    pen = ImageDraw.Draw(mask)
    if thing.texture == "striped":
        for offset in range(-CANVAS, CANVAS, 18):
            pen.line((offset, CANVAS, offset + CANVAS, 0), fill=255, width=7)
    else:
        for row, y in enumerate(range(0, CANVAS, 15)):
            for x in range(8 * (row % 2), CANVAS, 16):
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=255)
    return mask


def paint_filled(picture: Image.Image, thing: Thing) -> None:
    """Every part in its own colour, the texture over the parts and under the details."""
    pen = ImageDraw.Draw(picture)
    polygons = parts(thing)
    for part in polygons:
        if not part.detail:
            pen.polygon(part.points, fill=part.colour)
    if thing.texture != "plain":
        inked = ImageChops.multiply(silhouette(thing), texture_mask(thing))
        picture.paste(contrast(thing.top), (0, 0), inked)
        pen = ImageDraw.Draw(picture)
    for part in polygons:
        if part.detail:
            pen.polygon(part.points, fill=part.colour)


def paint_outline(picture: Image.Image, thing: Thing) -> None:
    """Hollow: only the contours, hidden ones left out. A second tone shows as a filled lower half."""
    lines = Image.new("L", (CANVAS, CANVAS), 0)
    pen = ImageDraw.Draw(lines)
    polygons = parts(thing)
    colour = polygons[0].colour
    for part in polygons:
        if not part.detail:
            pen.polygon(part.points, fill=0)
            pen.line([*part.points, *part.points[:2]], fill=255, width=STROKE, joint="curve")
            colour = part.colour
    picture.paste(colour, (0, 0), lines)
    ink = ImageDraw.Draw(picture)
    for part in polygons:
        if part.detail:
            ink.polygon(part.points, fill=part.colour)


def paint_shaded(picture: Image.Image, thing: Thing) -> None:
    """Filled, then lit from the upper left: from a highlight through the colour to deep shade."""
    before = picture.copy()
    paint_filled(picture, thing)
    ys, xs = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) / OVERSAMPLING
    along = ((xs - thing.x) + (ys - thing.y)) / (1.6 * thing.radius)
    light = np.clip(-along, 0, 1)[..., None] * 0.65
    shadow = np.clip(along, 0, 1)[..., None] * 0.75
    pixels = np.asarray(picture, dtype=np.float32)
    lit = pixels * (1 - shadow) * (1 - light) + 255 * light
    picture.paste(Image.fromarray(lit.clip(0, 255).astype(np.uint8)), (0, 0))
    picture.paste(before, (0, 0), ImageChops.invert(silhouette(thing)))


def paint_sticker(picture: Image.Image, thing: Thing) -> None:
    """A die-cut border of white paper and the shadow it throws."""
    rim = Image.new("L", (CANVAS, CANVAS), 0)
    pen = ImageDraw.Draw(rim)
    for part in parts(thing):
        pen.polygon(part.points, fill=255)
        pen.line([*part.points, *part.points[:2]], fill=255, width=22, joint="curve")
    shadow = ImageChops.offset(rim, 10, 12).filter(ImageFilter.GaussianBlur(3))
    picture.paste((20, 20, 26), (0, 0), shadow.point(lambda level: int(level * 0.7)))
    picture.paste((255, 255, 255), (0, 0), rim)
    paint_filled(picture, thing)


PAINTERS = {
    "flat": paint_filled,
    "outline": paint_outline,
    "pixelated": paint_filled,
    "shaded": paint_shaded,
    "sticker": paint_sticker,
}


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of `scene`, RGB, 64 x 64. `rng` decides only what the scene leaves open (stars, flakes, tints)."""
    picture = backdrop(scene, rng)
    for thing in scene.things:
        PAINTERS[scene.style](picture, thing)
    small = picture.reduce(OVERSAMPLING)
    if scene.style == "pixelated":
        return small.reduce(4).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return small


def coverage(thing: Thing, cells: int) -> np.ndarray:
    """The share of each cell of a `cells` x `cells` grid that `thing` covers: float32 in [0, 1]."""
    return np.asarray(silhouette(thing).reduce(CANVAS // cells), dtype=np.float32) / 255
