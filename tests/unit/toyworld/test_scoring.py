"""Scores against pictures whose contents are known, and the strict rule against pictures that only come near."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_pipeline.toyworld.drawing import draw
from lora_pipeline.toyworld.expectation import expectation
from lora_pipeline.toyworld.judge import HEADS, Judge
from lora_pipeline.toyworld.scene import COLOURS, CREATURES, Scene, Thing, mascot_scene
from lora_pipeline.toyworld.scoring import (
    TWO_OBJECTS,
    Found,
    JudgeScorer,
    Reading,
    both_objects,
    islands,
    objects,
    readings,
    score_base,
    score_drawings,
    verdicts,
)

PAIR = "a flat drawing of a red cat left of a blue star on a beach"
CAT, STAR = Found("cat", "red", 4.0, 8.0), Found("star", "blue", 12.0, 8.0)


def reading(*found: Found, **names: str) -> Reading:
    told = {"kind": "cat", "colour": "red", "background": "beach", "texture": "plain", "size": "medium"}
    told |= {"top": told["colour"], "bottom": told["colour"], "ear": told["colour"]}
    return Reading(told | {"style": "flat", "count": "two" if len(found) == 2 else "one"} | names, found)


def thing(kind: str, colour: str, x: float, y: float, radius: float = 10.5) -> Thing:
    paint = COLOURS[colour]
    return Thing(kind, colour, paint, paint, paint, "plain", "small", x, y, radius, 0, CREATURES.get(kind))


def drawn(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene, np.random.default_rng(0)))[None]


@pytest.mark.parametrize(
    "found",
    [
        (CAT,),
        (CAT, STAR, Found("star", "blue", 12.0, 3.0)),
        (replace(CAT, x=12.0), replace(STAR, x=4.0)),
        (replace(CAT, colour="blue"), replace(STAR, colour="red")),
        (replace(CAT, kind="robot"), STAR),
        (CAT, replace(STAR, colour="green")),
        (replace(CAT, x=8.0, y=4.0), replace(STAR, x=8.5, y=12.0)),
    ],
    ids=["one", "three", "swapped places", "swapped colours", "wrong kind", "wrong colour", "above instead"],
)
def test_the_strict_rule_refuses_what_only_comes_near(found: tuple[Found, ...]) -> None:
    assert both_objects(reading(CAT, STAR), expectation(PAIR))
    assert not both_objects(reading(*found, count="two"), expectation(PAIR))


def test_the_strict_rule_wants_the_picture_to_look_like_two() -> None:
    assert not both_objects(reading(CAT, STAR, count="one"), expectation(PAIR))


def test_above_means_above() -> None:
    asked = expectation("a red cat above a blue star")
    high, low = replace(CAT, x=8, y=3), replace(STAR, x=8, y=12)
    assert both_objects(reading(low, high), asked)
    assert not both_objects(reading(replace(high, y=12), replace(low, y=3)), asked)


@pytest.mark.parametrize(
    ("parts", "right"),
    [
        ({}, True),
        ({"colour": "composite", "kind": "creature"}, True),
        ({"ear": "none"}, True),
        ({"top": "blue"}, False),
        ({"bottom": "blue"}, False),
        ({"ear": "blue"}, False),
        ({"kind": "star", "top": "blue", "ear": "none"}, True),
        ({"kind": "star", "colour": "blue"}, False),
    ],
)
def test_a_creature_has_a_colour_in_all_its_parts(parts: dict[str, str], right: bool) -> None:
    assert verdicts(reading(CAT, **parts), expectation("a red thing"))["colour"] is right


def test_the_judge_tells_a_red_cat_from_one_that_is_red_above(judge: Judge) -> None:
    cat = thing("cat", "red", 32.0, 32.0, radius=16.0)
    for painted, right in ((cat, True), (replace(cat, bottom=COLOURS["blue"]), False)):
        (read,) = readings(judge, drawn(Scene((painted,), "white", "flat")))
        assert verdicts(read, expectation("a red cat"))["colour"] is right


def test_only_what_is_asked_is_scored() -> None:
    assert verdicts(reading(CAT), expectation("a cat")) == {"kind": True}
    assert verdicts(reading(CAT), expectation("a small blue cat in the snow")) == {
        "background": False, "colour": False, "size": False, "kind": True,
    }  # fmt: skip
    assert verdicts(reading(CAT, STAR), expectation(PAIR)) == {"background": True, "style": True, TWO_OBJECTS: True}


def test_two_things_are_not_one() -> None:
    assert verdicts(reading(CAT, STAR), expectation("a cat")) == {"kind": False}


@pytest.mark.parametrize(("kind", "right"), [("cat", True), ("bunny", True), ("creature", True), ("star", False)])
def test_a_creature_is_any_creature(kind: str, right: bool) -> None:
    assert verdicts(reading(CAT, kind=kind), expectation("a <zorp> creature")) == {"kind": right}


def test_islands_are_four_connected() -> None:
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]], bool)
    assert [sorted(map(tuple, part.tolist())) for part in islands(mask)] == [
        [(0, 0), (0, 1)],
        [(1, 2), (2, 2), (2, 3)],
        [(2, 0)],
    ]


def test_objects_are_named_by_all_their_cells_and_specks_are_not_objects() -> None:
    core = torch.full((16, 16), -5.0)
    core[2:4, 3:6] = 5.0
    core[10, 10] = 5.0
    cells = {name: torch.zeros(len(HEADS[name]), 16, 16) for name in ("kind", "colour")}
    cells["kind"][HEADS["kind"].index("heart"), 2:4, 3:6] = 1.0
    cells["kind"][HEADS["kind"].index("cat"), 2, 3] = 2.0
    cells["colour"][HEADS["colour"].index("green"), 2:4, 3:6] = 1.0
    assert objects(core, cells) == (Found("heart", "green", 4.0, 2.5),)


def test_the_judge_sees_two_objects_where_two_are_drawn(judge: Judge) -> None:
    scorer = JudgeScorer(judge)
    cat, star = thing("cat", "red", 16, 33), thing("star", "blue", 48, 33)
    pair = drawn(Scene((cat, star), "beach", "flat", "left of"))
    assert scorer.prompt_accuracy(pair, [PAIR]) == pytest.approx([1.0])
    assert scorer.prompt_accuracy(
        pair, ["a flat drawing of a blue star left of a red cat on a beach"]
    ) == pytest.approx([2 / 3])
    one = drawn(Scene((thing("cat", "red", 32, 33),), "beach", "flat"))
    assert scorer.prompt_accuracy(one, [PAIR]) == pytest.approx([2 / 3])


def test_one_object_cut_in_two_is_not_two_objects(judge: Judge) -> None:
    """The false win of a loose rule: one star, its left half red and its right half blue."""
    red, blue = (drawn(Scene((thing("star", c, 32, 33, 22),), "beach", "flat")) for c in ("red", "blue"))
    cut = np.concatenate([red[:, :, :32], blue[:, :, 32:]], axis=2)
    asked = "a flat drawing of a red star left of a blue star on a beach"
    assert JudgeScorer(judge).prompt_accuracy(cut, [asked]) <= 2 / 3 + 1e-6


def test_a_prompt_that_asks_for_nothing_is_met(judge: Judge) -> None:
    picture = drawn(mascot_scene(np.random.default_rng(0), "zorp"))
    assert JudgeScorer(judge).prompt_accuracy(picture, ["a <zorp>"]) == pytest.approx([1.0])


def test_drawings_score_high_and_drawings_of_other_prompts_low(judge: Judge) -> None:
    real = score_drawings(judge, count=120)
    assert min(real[name] for name in ("kind", "colour", "background", "style", TWO_OBJECTS)) >= 0.85

    def beside_the_point(prompts: list[str], seeds: list[int]) -> np.ndarray:
        assert len(prompts) == len(seeds) == 40
        return np.repeat(drawn(Scene((thing("cat", "red", 32, 33),), "beach", "flat")), len(prompts), axis=0)

    wrong = score_base(beside_the_point, judge, count=40)
    assert wrong[TWO_OBJECTS] == 0
    assert max(wrong["kind"], wrong["colour"], wrong["background"]) < 0.4


def test_a_scorer_gives_unit_vectors_by_kind_of_likeness(judge: Judge) -> None:
    scorer = JudgeScorer(judge)
    zorp = np.concatenate([drawn(mascot_scene(np.random.default_rng(i), "zorp", b)) for i, b in enumerate(COLOURS)])
    assert torch.allclose(scorer.identity(zorp).norm(dim=1), torch.ones(len(zorp)), atol=1e-5)
    assert float((scorer.identity(zorp) @ scorer.identity(zorp).T).min()) > 0.7
    assert float((scorer.style(zorp) @ scorer.style(zorp).T).min()) > 0.8
