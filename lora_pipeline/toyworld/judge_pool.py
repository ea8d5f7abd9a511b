"""The pictures the judge learns from: drawings, and what the autoencoder makes of some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_pipeline.toyworld.drawing import draw
from lora_pipeline.toyworld.labels import Labels, label
from lora_pipeline.toyworld.pictures import pictures
from lora_pipeline.toyworld.scene import HELD_OUT_STYLE, SIDE, Scene, composite_scene, random_scene, restyled

Sample = Callable[[np.random.Generator], Scene]
Reconstruct = Callable[[np.ndarray], np.ndarray]  # uint8 (n, 64, 64, 3) through the autoencoder and back

REBUILT_EVERY = 16  # one drawing in so many is also learned from as the autoencoder shows it
BATCH = 500


@dataclass(frozen=True)
class Counts:
    """Drawings of each source: the base's world, any creatures, the world as stickers, any creatures drawn flat."""

    world: int = 50_000
    composites: int = 30_000
    stickers: int = 10_000
    flats: int = 10_000


@dataclass(frozen=True)
class Pool:
    """uint8 (n, 64, 64, 3) drawings and (m, 64, 64, 3) reconstructions, with their labels."""

    drawn: np.ndarray
    drawn_labels: Labels
    rebuilt: np.ndarray
    rebuilt_labels: Labels


def sticker_scene(rng: np.random.Generator) -> Scene:
    """A scene of the base's world, drawn as stickers."""
    return restyled(random_scene(rng), HELD_OUT_STYLE)


def flat_scene(rng: np.random.Generator) -> Scene:
    """A composite creature, drawn flat."""
    return restyled(composite_scene(rng), "flat")


# Numbered apart from the streams of `pictures` (0 to 3): the judge alone sees these.
OWN: dict[str, tuple[int, Sample]] = {"stickers": (4, sticker_scene), "flats": (5, flat_scene)}


def streamed(stream: str, count: int, seed: int, workers: int = 1) -> tuple[list[Scene], np.ndarray]:
    """The first `count` scenes of a stream of `pictures`, with their uint8 (count, 64, 64, 3) pictures."""
    scenes: list[Scene] = []
    pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for chunk in pictures(stream, count, seed, workers):
        pixels[len(scenes) : len(scenes) + len(chunk)] = np.stack([picture.pixels for picture in chunk])
        scenes += [picture.scene for picture in chunk]
    return scenes, pixels


def own(source: str, count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """The first `count` scenes of one of the judge's own sources, with their uint8 (count, 64, 64, 3) pictures."""
    number, sample = OWN[source]
    scenes, pixels = [], np.empty((count, SIDE, SIDE, 3), np.uint8)
    for index in range(count):
        rng = np.random.default_rng([seed, number, index])
        scenes.append(sample(rng))
        pixels[index] = np.asarray(draw(scenes[-1], rng))
    return scenes, pixels


def reconstructed(pixels: np.ndarray, vae: Reconstruct) -> np.ndarray:
    """`pixels` through the autoencoder, in batches."""
    return np.concatenate([vae(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])


def remembered(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array kept at `path`, made and kept there the first time."""
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        np.save(partial, make())
        partial.replace(path)
    array: np.ndarray = np.load(path, allow_pickle=False)
    return array


def gather(work: Path, vae: Reconstruct | None, counts: Counts, seed: int, workers: int = 1) -> Pool:
    """The judge's pool; what takes minutes to make (the reconstructions) is kept in the folder `work`.

    Without a `vae` there are no reconstructions, and the judge reads drawings only.
    """
    sources = [
        streamed("world", counts.world, seed, workers),
        streamed("composites", counts.composites, seed, workers),
        own("stickers", counts.stickers, seed),
        own("flats", counts.flats, seed),
    ]
    drawn = np.concatenate([pixels for _, pixels in sources])
    labels = label([scene for scenes, _ in sources for scene in scenes])
    rows = np.arange(0, len(drawn), REBUILT_EVERY) if vae else np.arange(0)
    if vae is None:
        return Pool(drawn, labels, drawn[rows], labels.rows(rows))
    rebuilt = remembered(work / "rebuilt.npy", lambda: reconstructed(drawn[rows], vae))
    return Pool(drawn, labels, rebuilt, labels.rows(rows))
