"""Prompts read back into what they ask for."""

from __future__ import annotations

import numpy as np
import pytest

from lora_pipeline.toyworld.captions import prompt
from lora_pipeline.toyworld.expectation import Asked, Expectation, expectation
from lora_pipeline.toyworld.scene import random_scene

NOTHING = Asked(None, None, None, None)


def test_a_prompt_made_of_a_scene_is_read_back() -> None:
    for index in range(500):
        scene = random_scene(np.random.default_rng([3, index]))
        asked = expectation(prompt(scene))
        assert (asked.background, asked.style, asked.relation) == (scene.background, scene.style, scene.relation)
        assert [(a.kind, a.colour) for a in asked.things] == [(t.kind, t.colour) for t in scene.things]
        if not scene.relation:
            (thing,) = scene.things
            assert asked.things[0].size == (None if thing.size == "medium" else thing.size)
            assert asked.things[0].texture == (None if thing.texture == "plain" else thing.texture)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("", Expectation((NOTHING,), None, None)),
        ("a <zorp> creature on a beach", Expectation((Asked("creature", None, None, None),), "beach", None)),
        ("a <red> cat", Expectation((Asked("cat", None, None, None),), None, None)),
        ("a portrait of someone", Expectation((NOTHING,), None, None)),
        (
            "A Red cat on a blue background, shaded drawing",
            Expectation((Asked("cat", "red", None, None),), "blue", "shaded"),
        ),
        ("a sticker drawing of a circle", Expectation((Asked("circle", None, None, None),), None, "sticker")),
    ],
)
def test_words_ask_for_what_they_say(words: str, asked: Expectation) -> None:
    assert expectation(words) == asked


@pytest.mark.parametrize(("said", "meant"), [("right of", "left of"), ("below", "above")])
def test_turned_relations_ask_for_the_same_picture(said: str, meant: str) -> None:
    assert expectation(f"a red cat {said} a blue star in the snow") == expectation(
        f"a blue star {meant} a red cat in the snow"
    )
