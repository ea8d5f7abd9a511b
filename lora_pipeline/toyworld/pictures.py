"""Numbered pictures of the toy world: picture `index` of a stream is the same on every machine, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np

from lora_pipeline.toyworld.captions import training_caption
from lora_pipeline.toyworld.drawing import draw
from lora_pipeline.toyworld.scene import Scene, composite_scene, random_scene

CHUNK = 2000

# A stream is a numbered source of scenes: the base's own world, creatures of any parts, and fresh ones for scoring.
STREAMS: dict[str, tuple[int, Callable[[np.random.Generator], Scene]]] = {
    "world": (0, random_scene),
    "composites": (1, composite_scene),
    "fresh-world": (2, random_scene),
    "fresh-composites": (3, composite_scene),
}


@dataclass(frozen=True)
class Picture:
    """One drawn scene with the caption it is trained under. `pixels`: uint8 (64, 64, 3)."""

    scene: Scene
    caption: str
    pixels: np.ndarray


def picture(stream: str, index: int, seed: int = 0) -> Picture:
    """Picture `index` of `stream`, a pure function of its arguments."""
    number, sample = STREAMS[stream]
    rng = np.random.default_rng([seed, number, index])
    scene = sample(rng)
    return Picture(scene, training_caption(scene, rng), np.asarray(draw(scene, rng)))


def _chunk(start: int, stream: str, seed: int, stop: int) -> list[Picture]:
    return [picture(stream, index, seed) for index in range(start, min(start + CHUNK, stop))]


def pictures(stream: str, count: int, seed: int = 0, workers: int = 1) -> Iterator[list[Picture]]:
    """The first `count` pictures of `stream` in order, in chunks, drawn by `workers` processes."""
    starts = range(0, count, CHUNK)
    job = partial(_chunk, stream=stream, seed=seed, stop=count)
    if workers == 1:
        yield from map(job, starts)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(job, starts)
