"""Labels against the scenes they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from lora_pipeline.toyworld.drawing import coverage
from lora_pipeline.toyworld.judge import HEADS, PALETTE, PARTS
from lora_pipeline.toyworld.labels import UNTOLD, cell_targets, label, nearest_paint
from lora_pipeline.toyworld.scene import (
    COLOURS,
    PINK,
    Scene,
    composite_scene,
    mascot_scene,
    random_scene,
    restyled,
    shade,
)
from lora_pipeline.toyworld.scoring import islands


def scenes(count: int) -> list[Scene]:
    return [random_scene(np.random.default_rng([8, index])) for index in range(count)]


def named(scene: Scene, head: str) -> str:
    return (HEADS | PARTS)[head][int(label([scene]).heads[head][0])]


def test_a_mascot_is_labelled_by_its_parts() -> None:
    zorp = mascot_scene(np.random.default_rng(0), "zorp", "beach", "large")
    told = {head: named(zorp, head) for head in HEADS | PARTS}
    assert told == {
        "kind": "creature", "colour": "composite", "background": "beach", "texture": "plain", "size": "large",
        "style": "flat", "count": "one", "body": "round", "ears": "pointed", "eyes": "2",
        "top": "orange", "bottom": "blue", "ear": "blue",
    }  # fmt: skip


def test_shapes_have_no_parts_but_a_colour() -> None:
    shape = next(s for s in scenes(50) if len(s.things) == 1 and s.things[0].anatomy is None)
    assert {named(shape, part) for part in ("body", "ears", "eyes", "bottom", "ear")} == {"none"}
    assert named(shape, "top") == shape.things[0].colour


def test_pairs_tell_their_number_background_and_style_only() -> None:
    pair = next(s for s in scenes(50) if s.relation)
    heads = label([pair]).heads
    told = {name for name, values in heads.items() if values[0] != UNTOLD}
    assert told == {"count", "background", "style"}
    assert named(pair, "count") == "two"


def test_outlines_hide_the_ears_of_composites() -> None:
    scene = composite_scene(np.random.default_rng(3))
    assert label([restyled(scene, "outline")]).heads["ear"][0] == UNTOLD
    assert label([restyled(scene, "flat")]).heads["ear"][0] != UNTOLD


@pytest.mark.parametrize("name", PALETTE)
def test_shades_keep_their_name(name: str) -> None:
    rng = np.random.default_rng(1)
    paint = COLOURS.get(name, PINK)
    assert {nearest_paint(shade(rng, paint)) for _ in range(50)} == {name}


def test_cores_lie_inside_things_and_never_touch() -> None:
    for scene in scenes(120):
        core, cells = cell_targets(label([scene]))
        parts = islands(core[0].numpy() > 0)
        assert len(parts) == len(scene.things)
        found = {
            (HEADS["kind"][int(cells["kind"][0][r, c])], HEADS["colour"][int(cells["colour"][0][r, c])])
            for part in parts
            for r, c in part
        }
        assert found == {(thing.kind, thing.colour) for thing in scene.things}
        assert (cells["kind"][0][core[0] == 0] == UNTOLD).all()


def test_the_core_of_a_disc_is_covered_by_it() -> None:
    disc = next(s for s in scenes(200) if len(s.things) == 1 and s.things[0].kind == "circle")
    core, _ = cell_targets(label([disc]))
    assert coverage(disc.things[0], 16)[core[0].numpy() > 0].min() > 0.9


def test_rows_and_joining_keep_order() -> None:
    labels = label(scenes(6))
    joined = labels.rows(np.array([4, 1])).joined(labels.rows(np.array([2])))
    for head, values in labels.heads.items():
        assert joined.heads[head].tolist() == values[[4, 1, 2]].tolist()
    assert np.array_equal(joined.places, labels.places[[4, 1, 2]])
    assert np.array_equal(joined.kinds, labels.kinds[[4, 1, 2]])
