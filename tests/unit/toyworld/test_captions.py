"""Captions say what a scene shows, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from lora_pipeline.toyworld.captions import article, prompt, training_caption
from lora_pipeline.toyworld.expectation import ANY_CREATURE, expectation
from lora_pipeline.toyworld.scene import CREATURES, Scene, Thing, random_scene


def thing(kind: str, colour: str, texture: str = "plain", size: str = "medium") -> Thing:
    paint = (1, 2, 3)
    return Thing(kind, colour, paint, paint, paint, texture, size, 32, 32, 16, 0, CREATURES.get(kind))


@pytest.mark.parametrize(
    ("scene", "words"),
    [
        (Scene((thing("cat", "red"),), "beach", "flat"), "a flat drawing of a red cat on a beach"),
        (
            Scene((thing("star", "orange", "striped", "small"),), "orange", "outline"),
            "an outline drawing of a small striped orange star on an orange background",
        ),
        (
            Scene((thing("cat", "orange"), thing("heart", "blue")), "night", "shaded", "left of"),
            "a shaded drawing of an orange cat left of a blue heart at night",
        ),
    ],
)
def test_a_prompt_says_everything_once(scene: Scene, words: str) -> None:
    assert prompt(scene) == words


@pytest.mark.parametrize(("word", "phrase"), [("orange", "an orange"), ("red", "a red"), ("outline", "an outline")])
def test_articles(word: str, phrase: str) -> None:
    assert article(word) == phrase


def test_training_captions_never_contradict_their_scene() -> None:
    for index in range(800):
        rng = np.random.default_rng([5, index])
        scene = random_scene(rng)
        told = expectation(training_caption(scene, rng))
        assert told.background in (None, scene.background)
        assert told.style in (None, scene.style)
        assert told.relation == scene.relation
        for asked, shown in zip(told.things, scene.things, strict=True):
            assert asked.kind == shown.kind or (asked.kind == ANY_CREATURE and shown.kind in CREATURES)
            assert asked.colour in (None, shown.colour)
            assert asked.texture in (None, shown.texture)
            assert asked.size in (None, shown.size)


def test_training_captions_drop_words_and_use_every_wording() -> None:
    captions = []
    for index in range(800):
        rng = np.random.default_rng([6, index])
        captions.append(training_caption(random_scene(rng), rng))
    for words in ("right of", "below", "a picture of", "creature"):
        assert any(words in caption for caption in captions)
    assert any(caption.endswith("drawing") for caption in captions)
    told = [expectation(caption) for caption in captions]
    assert 0.85 < np.mean([asked.background is not None for asked in told]) < 0.97
    assert 0.5 < np.mean([asked.style is not None for asked in told]) < 0.95
