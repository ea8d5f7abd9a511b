"""Whole runs on an untrained base of a few thousand parameters."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from train_values import train_params

from lora_pipeline.errors import CorruptError, ParamsError, PipelineError
from lora_pipeline.injection.tokens import add_placeholder, initial_rows
from lora_pipeline.pretrained.components import Components
from lora_pipeline.training.tuning import Task, Tuned, tune

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("default::FutureWarning")


def silent(step: int, values: dict[str, float]) -> None:
    del step, values


def weights(parts: Components) -> dict[str, Tensor]:
    models = {"unet": parts.unet, "text": parts.text_encoder, "vae": parts.vae}
    states = {name: model.state_dict() for name, model in models.items()}
    return {f"{name}.{key}": value.clone() for name, state in states.items() for key, value in state.items()}


def run(folder: Path, task: Task, parts: Components | None = None) -> Tuned:
    work = folder / f"work{len(list(folder.iterdir()))}"
    work.mkdir()
    return tune(parts or tiny.components(folder / "tokenizer"), task, work, silent)


def same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_killed_and_started_again_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("tune_run.py")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("method", "steps", "moves"), [("ti", 3, "rows"), ("lora", 4, "factors"), ("pti", 7, "both")])
def test_each_method_moves_what_it_says_and_leaves_the_base(
    tmp_path: Path, method: str, steps: int, moves: str
) -> None:
    parts = tiny.components(tmp_path / "tokenizer")
    before, words = weights(parts), dict(parts.tokenizer.get_vocab())
    start = initial_rows(parts.tokenizer, parts.text_encoder, "creature", 1)
    tuned = run(tmp_path, tiny.task(tmp_path, {"method": method}), parts)
    assert same(weights(parts), before)
    assert parts.tokenizer.get_vocab() == words
    assert len(tuned.losses) == steps
    assert bool(tuned.factors) == (moves != "rows")
    assert all(bool(factors.up.any()) for factors in tuned.factors.values())
    assert bool(tuned.embeddings) == (moves != "factors")
    for rows in tuned.embeddings.values():
        assert not torch.equal(rows, start)
        largest = before["text.embeddings.token_embedding.weight"].norm(dim=1).max()
        assert rows.norm() <= largest * 1.0001


def test_pivotal_tuning_keeps_the_inverted_rows(tmp_path: Path) -> None:
    task = tiny.task(tmp_path)
    inverted = run(tmp_path, dataclasses.replace(task, params=train_params({"method": "ti"})))
    assert same(run(tmp_path, task).embeddings, inverted.embeddings)


def test_seeds_decide_and_a_base_can_be_used_again(tmp_path: Path) -> None:
    task, parts = tiny.task(tmp_path), tiny.components(tmp_path / "tokenizer")
    first, again = run(tmp_path, task, parts), run(tmp_path, task, parts)
    other = run(tmp_path, dataclasses.replace(task, seed=8), parts)
    assert [each.loss for each in first.losses] == [each.loss for each in again.losses]
    assert first.losses[0].loss != other.losses[0].loss


def test_the_loss_of_known_pictures_falls(tmp_path: Path) -> None:
    task = tiny.task(
        tmp_path,
        {"method": "lora", "tuning.steps": 150, "prior.weight": 0.0, "batch_size": 6, "adapter.unet_targets": ["*"]},
    )
    losses = [each.loss for each in run(tmp_path, task).losses]
    assert sum(losses[-30:]) < 0.9 * sum(losses[:30])


def test_text_encoder_factors_learn_when_asked(tmp_path: Path) -> None:
    tuned = run(
        tmp_path, tiny.task(tmp_path, {"adapter.unet_targets": [], "adapter.text_encoder_targets": ["*q_proj", "*fc1"]})
    )
    assert {name.split(".")[0] for name in tuned.factors} == {"text_encoder"}
    assert all(bool(factors.up.any()) for factors in tuned.factors.values())


def test_priors_pull_the_class_back(tmp_path: Path) -> None:
    task = tiny.task(tmp_path)
    with_priors = run(tmp_path, task)
    without = run(tmp_path, dataclasses.replace(task, params=train_params({"prior.weight": 0.0}), priors=()))
    assert same(with_priors.embeddings, without.embeddings)  # inversion learns nothing from them
    assert any(not torch.equal(with_priors.factors[name].up, without.factors[name].up) for name in without.factors)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"method": "lycoris"}, "concepts.zorp.train.method"),
        ({"adapter.rank": 0}, "concepts.zorp.train.adapter.rank"),
        ({"adapter.rank": 9}, "concepts.zorp.train.adapter.rank"),
        ({"adapter.unet_targets": ["*nothing*"]}, "concepts.zorp.train.adapter.unet_targets"),
        ({"adapter.unet_targets": []}, "concepts.zorp.train.adapter.unet_targets"),
        ({"token.initializer": "wombat"}, "concepts.zorp.train.token.initializer"),
        ({"token.initializer": " "}, "concepts.zorp.train.token.initializer"),
        ({"tuning.steps": 0}, "concepts.zorp.train.tuning.steps"),
        ({"tuning.timesteps": [0.5001, 0.5004]}, "concepts.zorp.train.tuning.timesteps"),
        ({"inversion.timesteps": [0.5001, 0.5004]}, "concepts.zorp.train.inversion.timesteps"),
        ({"objective.mask_background": 0.1}, "concepts.zorp.train.objective.mask_background"),
        ({"tuning.learning_rate": math.inf}, "concepts.zorp.train.tuning.learning_rate"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    parts = tiny.components(tmp_path / "tokenizer")
    before = weights(parts)
    with pytest.raises(ParamsError) as caught:
        run(tmp_path, tiny.task(tmp_path, changes), parts)
    assert caught.value.where == where
    assert same(weights(parts), before)


@pytest.mark.parametrize(
    ("changes", "kind", "where"),
    [
        ({"priors": ()}, ParamsError, "concepts.zorp.train.prior.weight"),
        ({"examples": ()}, ParamsError, "concepts.zorp.images"),
        ({"token": None}, ParamsError, "concepts.zorp.placeholder_token"),
        (
            {"priors": (), "token": None, "params": train_params({"method": "lora", "prior.target": "prediction"})},
            ParamsError,
            "concepts.zorp.train.prior.target",
        ),
        ({"token": "creature"}, ParamsError, "concepts.zorp.placeholder_token"),
        ({"token": "<other>"}, CorruptError, "000.png"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[PipelineError], where: str
) -> None:
    with pytest.raises(kind) as caught:
        run(tmp_path, dataclasses.replace(tiny.task(tmp_path), **changes))
    assert caught.value.where.endswith(where)


def test_captions_too_long_for_the_base_are_refused(tmp_path: Path) -> None:
    task = tiny.task(tmp_path)
    long = dataclasses.replace(task.examples[0], caption="a " * 30 + "<zorp> creature")
    with pytest.raises(ParamsError, match="base reads 22"):
        run(tmp_path, dataclasses.replace(task, examples=(long,)))


def test_a_token_of_several_vectors_has_as_many_rows(tmp_path: Path) -> None:
    tuned = run(tmp_path, tiny.task(tmp_path, {"method": "ti", "token.vectors": 3}))
    assert tuned.embeddings["<zorp>"].shape == (3, tiny.WIDTH)
    parts = tiny.components(tmp_path / "other")
    add_placeholder(parts.tokenizer, parts.text_encoder, "<zorp>", tuned.embeddings["<zorp>"])
