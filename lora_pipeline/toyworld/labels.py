"""What the judge should answer about a scene, as class numbers. -1 = the picture does not tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_pipeline.toyworld.judge import GRID, HEADS, PALETTE, PARTS
from lora_pipeline.toyworld.scene import COLOURS, PINK, SIDE, Rgb, Scene, Thing

CORE = 0.6  # of a thing's radius: small enough that the cores of two neighbours never touch
UNTOLD = -1


@dataclass(frozen=True)
class Labels:
    """Of n scenes.

    `heads`: name to (n,) int64; `places`: (n, 2, 3) float32 x, y, radius (radius 0 = no such thing); `kinds`,
    `colours`: (n, 2) int64 of each thing.
    """

    heads: dict[str, np.ndarray]
    places: np.ndarray
    kinds: np.ndarray
    colours: np.ndarray

    def rows(self, index: np.ndarray) -> Labels:
        """The labels of the scenes that `index` selects."""
        heads = {name: values[index] for name, values in self.heads.items()}
        return Labels(heads, self.places[index], self.kinds[index], self.colours[index])

    def joined(self, other: Labels) -> Labels:
        """These labels, then those of `other`."""
        heads = {name: np.concatenate([values, other.heads[name]]) for name, values in self.heads.items()}
        pairs = ((self.places, other.places), (self.kinds, other.kinds), (self.colours, other.colours))
        return Labels(heads, *(np.concatenate(pair) for pair in pairs))


def nearest_paint(paint: Rgb) -> str:
    """The palette's name for a shade."""
    paints = np.array([*COLOURS.values(), PINK])
    return PALETTE[int(((paints - np.array(paint)) ** 2).sum(1).argmin())]


def part_names(thing: Thing, style: str) -> dict[str, str | None]:
    """The parts a picture of `thing` shows. Outlines are drawn in one ink, so they hide a composite's ears."""
    if thing.anatomy is None:
        return {**dict.fromkeys(PARTS, "none"), "top": thing.colour}
    anatomy = thing.anatomy
    hidden = style == "outline" and thing.colour == "composite"
    return {
        "body": anatomy.body,
        "ears": anatomy.ears,
        "eyes": str(anatomy.eyes),
        "top": nearest_paint(thing.top),
        "bottom": nearest_paint(thing.bottom),
        "ear": None if hidden else nearest_paint(thing.ear),
    }


def scene_names(scene: Scene) -> dict[str, str | None]:
    """The right class of every head and part, None where the picture does not tell."""
    names: dict[str, str | None] = {"background": scene.background, "style": scene.style}
    if scene.relation:
        return dict.fromkeys(HEADS | PARTS) | names | {"count": "two"}
    (thing,) = scene.things
    told = {"kind": thing.kind, "colour": thing.colour, "texture": thing.texture, "size": thing.size, "count": "one"}
    return names | told | part_names(thing, scene.style)


def label(scenes: Sequence[Scene]) -> Labels:
    """The labels of `scenes`."""
    names = [scene_names(scene) for scene in scenes]
    heads = {
        head: np.array([UNTOLD if row[head] is None else classes.index(str(row[head])) for row in names])
        for head, classes in (HEADS | PARTS).items()
    }
    places = np.zeros((len(scenes), 2, 3), np.float32)
    kinds, colours = np.full((2, len(scenes), 2), UNTOLD)
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            places[row, column] = thing.x, thing.y, thing.radius
            kinds[row, column] = HEADS["kind"].index(thing.kind)
            colours[row, column] = HEADS["colour"].index(thing.colour)
    return Labels(heads, places, kinds, colours)


def cell_targets(labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
    """The grid's truth: cores (n, 16, 16) float32 of 0 and 1; kind and colour (n, 16, 16) int64, -1 off the cores."""
    centres = (np.arange(GRID, dtype=np.float32) + 0.5) * (SIDE / GRID)
    x, y, radius = (labels.places[:, :, i, None, None] for i in range(3))
    inside = np.hypot(centres[None, None, None, :] - x, centres[None, None, :, None] - y) < CORE * radius
    truth = {
        name: torch.from_numpy(np.where(inside, values[:, :, None, None], UNTOLD).max(1))
        for name, values in (("kind", labels.kinds), ("colour", labels.colours))
    }
    return torch.from_numpy(inside.any(1)).float(), truth
