"""Drawings against geometry: areas, places, colours, and what each style does to the pixels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lora_pipeline.toyworld.drawing import contrast, coverage, draw, shape_outline, silhouette
from lora_pipeline.toyworld.scene import (
    COLOURS,
    CREATURES,
    HELD_OUT_STYLE,
    SHAPES,
    STYLES,
    Scene,
    Thing,
    composite_scene,
    mascot_scene,
    random_scene,
    restyled,
)

RED = COLOURS["red"]


def lone(kind: str = "circle", style: str = "flat", texture: str = "plain", background: str = "white") -> Scene:
    thing = Thing(kind, "red", RED, RED, RED, texture, "medium", 32, 34, 16, 0, CREATURES.get(kind))
    return Scene((thing,), background, style)


def pixels(scene: Scene, seed: int = 0) -> np.ndarray:
    return np.asarray(draw(scene, np.random.default_rng(seed))).astype(int)


@pytest.mark.parametrize(
    ("kind", "area"),
    [("circle", math.pi * 0.95**2), ("square", 1.64**2), ("triangle", 0.5 * 1.96 * 1.8), ("cross", 4 * 0.68 - 0.68**2)],
)
def test_shapes_cover_the_area_geometry_says(kind: str, area: float) -> None:
    covered = coverage(lone(kind).things[0], 64).sum()
    assert covered == pytest.approx(area * 16**2, rel=0.05)


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_are_of_one_size(kind: str) -> None:
    reach = max(math.hypot(x, y) for x, y in shape_outline(kind))
    assert 0.9 < reach < 1.35


def test_coverage_is_a_share_of_each_cell() -> None:
    thing = lone("square").things[0]
    fine, coarse = coverage(thing, 64), coverage(thing, 16)
    assert coarse.shape == (16, 16)
    assert coarse == pytest.approx(fine.reshape(16, 4, 16, 4).mean((1, 3)), abs=0.01)


def test_a_flat_thing_has_its_colour_and_its_background_its_own() -> None:
    picture = pixels(lone())
    assert picture[34, 32].tolist() == list(RED)
    assert np.abs(picture[2, 2] - COLOURS["white"]).max() <= 10


def test_the_same_scene_and_generator_draw_the_same_picture() -> None:
    scene = random_scene(np.random.default_rng(4))
    assert np.array_equal(pixels(scene, 9), pixels(scene, 9))


@pytest.mark.parametrize("style", [*STYLES, HELD_OUT_STYLE])
def test_a_style_changes_the_picture_but_not_where_things_are(style: str) -> None:
    flat, styled = lone("star"), restyled(lone("star"), style)
    assert silhouette(flat.things[0]).tobytes() == silhouette(styled.things[0]).tobytes()
    if style != "flat":
        assert np.abs(pixels(flat) - pixels(styled)).mean() > 1


def test_outlines_are_hollow() -> None:
    picture = pixels(lone(style="outline"))
    assert np.abs(picture[34, 32] - COLOURS["white"]).max() <= 10
    assert np.abs(picture[34, 32 - 15] - RED).max() < 40


def test_pixelated_pictures_are_blocks_of_four() -> None:
    picture = pixels(lone(style="pixelated", background="beach"))
    blocks = picture.reshape(16, 4, 16, 4, 3)
    assert np.array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))


def test_shading_is_light_above_and_dark_below() -> None:
    picture = pixels(lone(style="shaded")).sum(-1)
    assert picture[26, 24] > sum(RED) + 50
    assert picture[42, 40] < sum(RED) - 50


def test_stickers_have_a_white_rim() -> None:
    scene = restyled(lone(background="green"), HELD_OUT_STYLE)
    assert pixels(scene)[34, 32 - 17].tolist() == [255, 255, 255]


@pytest.mark.parametrize("texture", ["striped", "dotted"])
def test_textures_ink_a_part_of_the_thing_and_nothing_else(texture: str) -> None:
    scene = lone("square", texture=texture)
    inked = (np.abs(pixels(scene) - pixels(lone("square"))).sum(-1) > 30).astype(float)
    inside = coverage(scene.things[0], 64)
    assert inked[inside == 0].sum() == 0
    assert 0.15 < inked[inside == 1].mean() < 0.7


def test_ink_stands_out_from_every_colour() -> None:
    for colour in COLOURS.values():
        assert abs(sum(contrast(colour)) - sum(colour)) > 150


def test_a_composite_creature_shows_its_three_colours() -> None:
    picture = pixels(replace(mascot_scene(np.random.default_rng(1), "zorp", "white", "large")))
    for colour in (COLOURS["orange"], COLOURS["blue"]):
        assert (np.abs(picture - colour).max(-1) == 0).sum() > 100


def test_lone_creatures_and_shapes_stay_inside_the_picture() -> None:
    for index in range(60):
        (thing,) = composite_scene(np.random.default_rng([2, index])).things
        covered = coverage(thing, 64)
        assert covered[:, [0, -1]].sum() + covered[-1].sum() == 0
