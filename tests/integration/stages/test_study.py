"""The pure parts of a study: its arms, and the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.methods import means_of
from benchmarks.methods import rows_of as compared
from lora_pipeline.errors import ParamsError, UsageError
from lora_pipeline.evaluation.measures import RESAMPLES
from lora_pipeline.params import ConceptParams, load_params
from lora_pipeline.toyworld.expectation import expectation
from lora_pipeline.training.phases import phases_of
from stages._study import ARMS, BACKGROUNDS, arm_params, drawn, picture_seeds, prompts_for, section_of
from stages._study_table import draws, gap_closed, interval, markdown, rows_of
from stages.study import asked


@pytest.fixture(scope="module")
def zorp() -> ConceptParams:
    return load_params(Path(__file__).parents[3] / "params.yaml").concepts["zorp"]


def test_gap_closed_is_nothing_at_the_base_and_all_at_real_drawings() -> None:
    arms = np.array([0.2, 0.5, 0.8, 1.1, 0.1])
    np.testing.assert_allclose(gap_closed(arms, np.array(0.2), np.array(0.8)), [0, 0.5, 1, 1.5, -1 / 6])


def test_every_arm_takes_the_same_steps(zorp: ConceptParams) -> None:
    assert len({(p := arm_params(zorp.train, arm)).inversion.steps + p.tuning.steps for arm in ARMS}) == 1
    assert {arm.name for arm in ARMS if arm_params(zorp.train, arm).prior.weight > 0} == {
        "dreambooth", "dreambooth by prediction", "pti", "joint",
    }  # fmt: skip
    assert {arm.name for arm in ARMS if arm_params(zorp.train, arm).inversion.steps > 0} == {"ti", "pti"}
    for arm in ARMS:
        phases_of(arm_params(zorp.train, arm))  # is one that can be


def test_arms_with_class_pictures_want_a_weight_for_them(zorp: ConceptParams) -> None:
    unweighted = zorp.train.model_copy(update={"prior": zorp.train.prior.model_copy(update={"weight": 0.0})})
    with pytest.raises(ParamsError, match=r"prior\.weight"):
        arm_params(unweighted, ARMS[1])


def test_another_subject_differs_in_its_name_alone(zorp: ConceptParams) -> None:
    mimo = section_of(zorp, "mimo")
    assert (mimo.placeholder_token, mimo.images) == ("<mimo>", "data/raw/mimo")
    assert section_of(zorp, "zorp") == zorp
    assert "zorp" not in mimo.model_dump_json()
    same = {"method", "tuning", "adapter"}
    assert mimo.train.model_dump(include=same) == zorp.train.model_dump(include=same)


def test_prompts_ask_for_every_background_equally() -> None:
    prompts = prompts_for("a <zorp> creature", 42)
    assert len(prompts) == 48
    assert [expectation(prompt).background for prompt in prompts] == [*BACKGROUNDS] * 6


def test_no_two_seeds_share_a_picture() -> None:
    assert not set(picture_seeds(7, 9_992)) & set(picture_seeds(8, 9_992))


def test_drawings_are_fresh_for_every_seed() -> None:
    first, again, other = drawn("zorp", 1, 8), drawn("zorp", 1, 8), drawn("zorp", 2, 8)
    assert np.array_equal(first, again)
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_draws_start_with_the_mean_and_resample_within_a_seed() -> None:
    values = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    told = draws(values, np.random.default_rng(0))
    assert told.shape == (1 + RESAMPLES,)
    assert told[0] == 0.5
    # Pictures of a seed are alike, so only the choice of two seeds out of two is left: 0, 1/2 and 1 as 1 : 2 : 1.
    assert set(told[1:]) == {0.0, 0.5, 1.0}
    assert np.mean(told[1:] == 0.5) == pytest.approx(0.5, abs=0.05)


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=(1, 400))
    told = interval(draws(values, np.random.default_rng(0)))
    assert told["high"] - told["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert told["low"] < values.mean() < told["high"]


def constant(**values: float) -> dict[str, np.ndarray]:
    """Cells of two seeds and three pictures without any spread."""
    return {name: np.full((2, 3), value) for name, value in values.items()}


def study_of(similarity: float) -> dict[str, dict[str, np.ndarray]]:
    return {
        "base": constant(similarity=0.2, accuracy=0.9, leak=0.2, diversity=0.5),
        "real": constant(similarity=1.0, accuracy=1.0),
        "arm": constant(similarity=similarity, accuracy=0.85, leak=0.3, drift=0.1, diversity=0.4),
    }


def test_the_table_holds_every_arm_against_its_own_subjects_base() -> None:
    rows = rows_of({"zorp": study_of(0.6), "mimo": study_of(0.8)}, 0)
    told = {(row["subject"], row["arm"]): row for row in rows}
    assert len(told) == 9
    assert told["zorp", "arm"]["gap_closed"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert told["mimo", "arm"]["gap_closed"] == {"mean": 0.75, "low": 0.75, "high": 0.75}
    assert told["all", "arm"]["gap_closed"] == {"mean": 0.625, "low": 0.625, "high": 0.625}
    assert told["all", "arm"]["points"] == {"mean": -5.0, "low": -5.0, "high": -5.0}
    assert told["zorp", "arm"]["rise"] == {"mean": 0.1, "low": 0.1, "high": 0.1}
    assert "gap_closed" not in told["zorp", "base"]


def test_one_subject_has_no_mean_over_subjects() -> None:
    assert {row["subject"] for row in rows_of({"zorp": study_of(0.6)}, 0)} == {"zorp"}


def test_the_table_is_markdown() -> None:
    head, rule, base, real, arm = markdown(rows_of({"zorp": study_of(0.6)}, 0)).splitlines()
    assert head.startswith("| subject | arm | subject similarity | gap closed |")
    assert rule == "|" + " --- |" * 10
    assert base.startswith("| zorp | base | 0.200 [0.200, 0.200] | – | 0.900 [0.900, 0.900] | – |")
    assert real.endswith("| – | – | – | – | – |")
    assert "| 0.50 [0.50, 0.50] | 0.850 [0.850, 0.850] | -5.0 [-5.0, -5.0] | 0.300 [0.300, 0.300] | +0.100 " in arm
    assert {line.count("|") for line in (head, rule, base, real, arm)} == {11}


def test_subjects_are_mascots() -> None:
    assert asked("mimo,zorp,mimo") == ["mimo", "zorp"]
    with pytest.raises(UsageError, match="zorg"):
        asked("zorg")


def test_the_benchmark_sets_methods_beside_each_other_by_what_is_better() -> None:
    means = {
        arm.name: {"drift": 0.1 * place, "diversity": 0.5, "leak": 0.2, "similarity": 0.1 * place, "gap_closed": 0.4}
        for place, arm in enumerate(ARMS, 1)
    }
    rows = {row.what: row for row in compared(means)}
    drift = rows["drift, dreambooth against lora"]
    assert (drift.ours, drift.peer, drift.ratio, drift.met) == (0.2, 0.1, 0.5, False)
    likeness = rows["similarity, joint against ti"]
    assert likeness.ratio == pytest.approx(1.5)
    assert likeness.met is True
    assert rows["gap closed, pti against dreambooth"].met is False
    document = {"rows": [{"subject": "all", "arm": "ti", "leak": {"mean": 0.5, "low": 0.4, "high": 0.6}},
                         {"subject": "zorp", "arm": "ti", "leak": {"mean": 0.7, "low": 0.4, "high": 0.9}}]}  # fmt: skip
    assert means_of(document) == {"ti": {"leak": 0.5}}
