"""Pictures held against their prompts: a share of right attributes, and a strict rule for two objects.

The rule: the picture shows two objects, and exactly two separate ones are found; each is of the asked kind and colour;
and they stand in the asked places. A looser rule counts one object cut in two as a success.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from torch import Tensor

from lora_pipeline.toyworld.captions import prompt
from lora_pipeline.toyworld.drawing import draw
from lora_pipeline.toyworld.expectation import ANY_CREATURE, Asked, Expectation, expectation
from lora_pipeline.toyworld.judge import HEADS, PARTS, Judge, answers, embedding
from lora_pipeline.toyworld.judge_pool import Reconstruct
from lora_pipeline.toyworld.scene import CREATURES, Scene, random_scene

NO_EAR = PARTS["ear"][0]
SMALLEST_CORE = 2  # cells; less is a speck
TWO_OBJECTS = "objects"
SCORED = ("kind", "colour", "background", "style", "texture", "size", TWO_OBJECTS)
SCORE_STREAM = 6  # apart from every stream of `pictures`
EVERY_FOURTH = 4

Render = Callable[[list[str], list[int]], np.ndarray]


@dataclass(frozen=True)
class Found:
    """One object on the grid. `x`, `y` in cells of the 16 x 16 grid."""

    kind: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """One picture in words: the name every head gives, and the separate objects."""

    names: dict[str, str]
    objects: tuple[Found, ...]


def islands(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of a boolean (h, w) mask, each as (k, 2) row and column numbers, in reading order."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        part = [start]
        for row, column in part:
            for step in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if step in left:
                    left.remove(step)
                    part.append(step)
        found.append(np.array(part))
    return found


def objects(core: Tensor, cells: dict[str, Tensor]) -> tuple[Found, ...]:
    """The objects of one picture from its grid logits: core (16, 16), cells name to (classes, 16, 16)."""
    evidence = {name: logits.log_softmax(0) for name, logits in cells.items()}
    found = []
    for island in islands((core > 0).numpy()):
        if len(island) < SMALLEST_CORE:
            continue
        rows, columns = island.T
        best = {name: int(values[:, rows, columns].sum(1).argmax()) for name, values in evidence.items()}
        kind, colour = (HEADS[name][best[name]] for name in ("kind", "colour"))
        found.append(Found(kind, colour, float(columns.mean()), float(rows.mean())))
    return tuple(found)


def readings(judge: Judge, images: np.ndarray) -> list[Reading]:
    """What the judge reads in uint8 (n, 64, 64, 3) pictures."""
    told = answers(judge, images)
    classes = HEADS | PARTS
    best = {name: logits.argmax(1).tolist() for name, logits in told.heads.items()}
    return [
        Reading(
            {name: classes[name][best[name][row]] for name in classes},
            objects(told.core[row], {name: logits[row] for name, logits in told.cells.items()}),
        )
        for row in range(len(images))
    ]


def fits_kind(shown: str, kind: str | None) -> bool:
    """Whether `shown` is the asked kind; `creature` asks for any creature, None for anything."""
    if kind == ANY_CREATURE:
        return shown in (*CREATURES, ANY_CREATURE)
    return kind in (None, shown)


def coloured(names: dict[str, str], colour: str) -> bool:
    """Whether a lone object is `colour` all over: a creature in each of its parts, by the heads that see them.

    The colour head calls a creature of unusual form composite, whatever its colours.
    """
    if fits_kind(names["kind"], ANY_CREATURE):
        return names["top"] == names["bottom"] == colour and names["ear"] in (colour, NO_EAR)
    return names["colour"] == colour


def fits(found: Found, thing: Asked) -> bool:
    """Whether an object has the asked kind and colour."""
    return fits_kind(found.kind, thing.kind) and thing.colour in (None, found.colour)


def both_objects(reading: Reading, asked: Expectation) -> bool:
    """The strict two-object rule."""
    if reading.names["count"] != "two" or len(reading.objects) != 2:
        return False
    across = asked.relation == "left of"
    first, second = sorted(reading.objects, key=lambda o: o.x if across else o.y)
    dx, dy = abs(first.x - second.x), abs(first.y - second.y)
    placed = dx > dy if across else dy > dx
    return placed and fits(first, asked.things[0]) and fits(second, asked.things[1])


def verdicts(reading: Reading, asked: Expectation) -> dict[str, bool]:
    """Attribute name to whether it is right, for what was asked. The kind is right of a lone object only."""
    names = reading.names
    told = {name: getattr(asked, name) for name in ("background", "style")}
    right = {name: names[name] == wanted for name, wanted in told.items() if wanted}
    if asked.relation:
        return right | {TWO_OBJECTS: both_objects(reading, asked)}
    (thing,) = asked.things
    told = {name: getattr(thing, name) for name in ("texture", "size")}
    right |= {name: names[name] == wanted for name, wanted in told.items() if wanted}
    if thing.colour:
        right["colour"] = coloured(names, thing.colour)
    if thing.kind:
        right["kind"] = names["count"] == "one" and fits_kind(names["kind"], thing.kind)
    return right


class JudgeScorer:
    """The judge as evaluation's `Scorer`. Pictures are uint8 (n, 64, 64, 3)."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def identity(self, images: np.ndarray) -> Tensor:
        """Unit vectors (n, 42): their cosine is the share of creature parts and colours in common."""
        return embedding(answers(self.judge, images), list(PARTS))

    def style(self, images: np.ndarray) -> Tensor:
        """Unit vectors (n, 5) from the style head."""
        return embedding(answers(self.judge, images), ["style"])

    def prompt_accuracy(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """(n,) in [0, 1]: the share of what each prompt asks that its picture shows; 1 where it asks for nothing."""
        pairs = zip(readings(self.judge, images), prompts, strict=True)
        told = [verdicts(reading, expectation(words)) for reading, words in pairs]
        return np.array([fmean(right.values()) if right else 1.0 for right in told])


def score_scenes(count: int, seed: int) -> list[Scene]:
    """The scenes whose prompts a base is scored on; every fourth has two objects."""
    return [random_scene(score_rng(seed, i), pairs=float(i % EVERY_FOURTH == EVERY_FOURTH - 1)) for i in range(count)]


def score_rng(seed: int, index: int) -> np.random.Generator:
    """The generator of scene `index` of a score."""
    return np.random.default_rng([seed, SCORE_STREAM, index])


def score_table(judge: Judge, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Attribute name to the share of the pictures asked for it that got it right, in [0, 1]."""
    told = [
        verdicts(reading, expectation(words)) for reading, words in zip(readings(judge, images), prompts, strict=True)
    ]
    counts = {name: [right[name] for right in told if name in right] for name in SCORED}
    return {name: fmean(values) for name, values in counts.items() if values}


def score_base(render: Render, judge: Judge, count: int = 500, seed: int = 0) -> dict[str, float]:
    """How often a base paints what it is told. `render`: prompts and seeds to uint8 (n, 64, 64, 3) pictures."""
    prompts = [prompt(scene) for scene in score_scenes(count, seed)]
    return score_table(judge, render(prompts, list(range(count))), prompts)


def score_drawings(
    judge: Judge, count: int = 500, seed: int = 0, through: Reconstruct | None = None,
) -> dict[str, float]:  # fmt: skip
    """The table's ceiling: the same scenes really drawn, or drawn and passed `through` the autoencoder."""
    scenes = score_scenes(count, seed)
    drawn = np.stack([np.asarray(draw(scene, score_rng(seed + 1, i))) for i, scene in enumerate(scenes)])
    return score_table(judge, through(drawn) if through else drawn, [prompt(scene) for scene in scenes])
