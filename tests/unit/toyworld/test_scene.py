"""The world's random scenes: inside the vocabulary, visible, and without what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from lora_pipeline.toyworld import scene as world


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.random_scene(np.random.default_rng([11, index])) for index in range(600)]


def test_every_word_of_the_world_occurs(scenes: list[world.Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.kind for thing in things} == set(world.KINDS)
    assert {thing.colour for thing in things} == set(world.COLOURS)
    assert {thing.texture for thing in things} == set(world.TEXTURES)
    assert {thing.size for thing in things} == set(world.SIZES)
    assert {scene.background for scene in scenes} == set(world.BACKGROUNDS)
    assert {scene.relation for scene in scenes} == {None, *world.RELATIONS}


def test_the_held_out_style_and_pink_never_occur(scenes: list[world.Scene]) -> None:
    assert {scene.style for scene in scenes} == set(world.STYLES)
    pink = np.array(world.PINK)
    paints = [paint for scene in scenes for t in scene.things for paint in (t.top, t.bottom, t.ear)]
    assert min(np.abs(np.array(paint) - pink).max() for paint in paints) > 8


def test_creatures_of_the_world_wear_one_colour(scenes: list[world.Scene]) -> None:
    assert all(thing.top == thing.bottom == thing.ear for scene in scenes for thing in scene.things)


def test_nothing_vanishes_into_its_background(scenes: list[world.Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            assert (thing.colour, scene.background) not in world.CAMOUFLAGE


def test_the_three_sizes_are_apart(scenes: list[world.Scene]) -> None:
    lone = [scene.things[0] for scene in scenes if len(scene.things) == 1]
    radii = {size: [thing.radius for thing in lone if thing.size == size] for size in world.SIZES}
    assert max(radii["small"]) < 0.85 * min(radii["medium"])
    assert max(radii["medium"]) < 0.9 * min(radii["large"])


def test_two_things_differ_in_colour_and_stand_as_the_relation_says(scenes: list[world.Scene]) -> None:
    pairs = [scene for scene in scenes if scene.relation]
    assert all(len(scene.things) == 2 for scene in pairs)
    for scene in pairs:
        first, second = scene.things
        assert first.colour != second.colour
        if scene.relation == "left of":
            assert second.x - first.x > 2 * abs(second.y - first.y)
        else:
            assert second.y - first.y > 2 * abs(second.x - first.x)


def test_mascots_differ_in_every_part() -> None:
    zorp, mimo = world.MASCOTS["zorp"], world.MASCOTS["mimo"]
    for part in ("body", "ears", "eyes"):
        assert getattr(zorp.anatomy, part) != getattr(mimo.anatomy, part)
    assert zorp.top != mimo.top
    assert zorp.bottom != mimo.bottom
    assert zorp.ear != mimo.ear
