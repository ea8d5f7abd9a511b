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


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_ranks_and_alphas_go_by_layer(tmp_path: Path) -> None:
    changes = {
        "method": "lora", "adapter.ranks": {"*attn*": 3, "*attn1*": 1}, "adapter.alphas": {"*.conv1": 5.0},
        "adapter.text_encoder_targets": ["*fc1"], "tuning.steps": 1,
    }  # fmt: skip
    found = run(tmp_path, tiny.task(tmp_path, changes)).factors
    for target, factors in found.items():
        expected = 1 if "attn1" in target else 3 if "attn" in target else 2
        assert factors.rank == expected
        assert factors.alpha == (5.0 if target.endswith("conv1") else 2.0)
    stabilised = run(tmp_path, tiny.task(_made(tmp_path / "b"), changes | {"adapter.rank_stabilised": True})).factors
    for target, factors in stabilised.items():
        assert factors.scale == pytest.approx(found[target].alpha / math.sqrt(factors.rank))


@pytest.mark.parametrize("key", ["adapter.ranks", "adapter.alphas"])
def test_a_pattern_that_matches_no_layer_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ParamsError, match="matches no layer") as refused:
        run(tmp_path, tiny.task(tmp_path, {"method": "lora", key: {"*nothing*": 3}}))
    assert refused.value.where == f"concepts.zorp.train.{key}"


def test_the_work_folder_is_made_where_there_is_none(tmp_path: Path) -> None:
    work = tmp_path / "not" / "there"
    tune(tiny.components(tmp_path / "tokenizer"), tiny.task(tmp_path, {"method": "ti"}), work, silent)
    assert (work / "LATEST").is_file()


JOINT = {"method": "joint", "tuning.token_learning_rate": 0.01}


@pytest.mark.parametrize("changes", [JOINT, JOINT | {"tuning.token_share": 0.5}, JOINT | {"method": "pti"}])
def test_the_token_goes_on_learning_beside_the_factors(tmp_path: Path, changes: dict[str, Any]) -> None:
    parts = tiny.components(tmp_path / "tokenizer")
    before = weights(parts)
    start = initial_rows(parts.tokenizer, parts.text_encoder, "creature", 1)
    task = tiny.task(tmp_path, changes)
    tuned = run(tmp_path, task, parts)
    assert same(weights(parts), before)
    assert not torch.equal(tuned.embeddings["<zorp>"], start)
    assert all(bool(factors.up.any()) for factors in tuned.factors.values())
    if changes["method"] == "pti":
        frozen = run(tmp_path, dataclasses.replace(task, params=train_params({})), parts)
        assert not torch.equal(tuned.embeddings["<zorp>"], frozen.embeddings["<zorp>"])


def test_taking_turns_moves_the_token_in_its_own_steps_alone(tmp_path: Path) -> None:
    """With a share of a half the first step is the factors' and the second the token's."""

    def of(steps: int, share: float) -> Tuned:
        changes = JOINT | {"tuning.token_share": share, "tuning.steps": steps, "optimiser.warm_up": 0.0}
        return run(tmp_path, dataclasses.replace(task, params=train_params(changes)))

    task = tiny.task(tmp_path)
    parts = tiny.components(tmp_path / "tokenizer")
    start = initial_rows(parts.tokenizer, parts.text_encoder, "creature", 1)
    one, two, all_token = of(1, 0.5), of(2, 0.5), of(2, 1.0)
    assert torch.equal(one.embeddings["<zorp>"], start)
    assert not torch.equal(two.embeddings["<zorp>"], start)
    assert all(torch.equal(factors.up, two.factors[name].up) for name, factors in one.factors.items())
    assert any(bool(factors.up.any()) for factors in one.factors.values())
    assert not any(bool(factors.up.any()) for factors in all_token.factors.values())


@pytest.mark.parametrize("text", [[], ["*q_proj"]])
@pytest.mark.parametrize("target", ["pictures", "prediction"])
def test_full_tuning_moves_copies_of_the_weights(tmp_path: Path, text: list[str], target: str) -> None:
    parts = tiny.components(tmp_path / "tokenizer")
    before = weights(parts)
    changes = {"method": "full", "adapter.text_encoder_targets": text, "prior.target": target}
    tuned = run(tmp_path, tiny.task(tmp_path, changes), parts)
    assert same(weights(parts), before)
    assert not tuned.factors
    assert not tuned.embeddings
    unet = {name.removeprefix("unet."): value for name, value in tuned.weights.items() if name.startswith("unet.")}
    assert unet.keys() == parts.unet.state_dict().keys()
    moved = [name for name, value in unet.items() if not torch.equal(value, before[f"unet.{name}"])]
    assert "conv_in.weight" in moved
    assert "conv_norm_out.bias" in moved
    assert bool(text) == any(name.startswith("text_encoder.") for name in tuned.weights)
    assert not any("token_embedding" in name for name in tuned.weights)


def test_full_tuning_finds_the_priors_targets_in_the_untouched_base(tmp_path: Path) -> None:
    """Where the base is asked for what it says itself, and nothing else is learnt, nothing changes."""
    changes = {"method": "full", "prior.target": "prediction", "prior.weight": 1.0, "tuning.steps": 1}
    task = tiny.task(tmp_path, changes)
    loss = run(tmp_path, task).losses[0].loss
    alone = (
        run(tmp_path, dataclasses.replace(task, params=train_params(changes | {"prior.weight": 0.0}))).losses[0].loss
    )
    assert loss == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("start", ["<random>", "<zero>"])
def test_a_token_may_start_without_words(tmp_path: Path, start: str) -> None:
    task = tiny.task(tmp_path, {"method": "ti", "token.initializer": start, "token.vectors": 2})
    first, again = run(tmp_path, task), run(tmp_path, task)
    assert bool(first.embeddings["<zorp>"].any())
    assert torch.equal(first.embeddings["<zorp>"], again.embeddings["<zorp>"])


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
        ({"method": "joint"}, "concepts.zorp.train.tuning.token_learning_rate"),
        ({"method": "lora", "tuning.token_learning_rate": 0.1}, "concepts.zorp.train.tuning.token_learning_rate"),
        ({"tuning.token_share": 0.5}, "concepts.zorp.train.tuning.token_share"),
        ({"method": "full", "engine.precision": "bfloat16"}, "concepts.zorp.train.engine.precision"),
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
