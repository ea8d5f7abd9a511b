"""The judge's file and its embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_pipeline.errors import CorruptError, MissingError
from lora_pipeline.toyworld.judge import HEADS, PARTS, Answers, Judge, answers, embedding, load_judge, save_judge

SIZE_LIMIT = 2_000_000  # bytes


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def one_hot(names: dict[str, int]) -> Answers:
    heads = {}
    for name, classes in (HEADS | PARTS).items():
        logits = torch.full((1, len(classes)), -40.0)
        logits[0, names.get(name, 0)] = 40.0
        heads[name] = logits
    return Answers(heads, torch.zeros(1, 16, 16), {})


def test_answers_have_the_documented_shapes_and_do_not_depend_on_the_batch(blank: Judge) -> None:
    images = noise(103)
    read = answers(blank, images)
    assert read.core.shape == (103, 16, 16)
    assert all(read.heads[name].shape == (103, len(classes)) for name, classes in (HEADS | PARTS).items())
    assert read.cells["kind"].shape == (103, len(HEADS["kind"]), 16, 16)
    alone = answers(blank, images[101:102])
    assert torch.allclose(read.heads["kind"][101], alone.heads["kind"][0], atol=1e-4)


def test_embeddings_are_unit_vectors(blank: Judge) -> None:
    vectors = embedding(answers(blank, noise(5)), list(PARTS))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5), atol=1e-5)


@pytest.mark.parametrize(("changed", "cosine"), [({}, 1.0), ({"ears": 1}, 5 / 6), ({"ears": 1, "top": 3}, 4 / 6)])
def test_the_cosine_of_two_identities_is_the_share_of_parts_in_common(changed: dict[str, int], cosine: float) -> None:
    first, second = embedding(one_hot({}), list(PARTS)), embedding(one_hot(changed), list(PARTS))
    assert float(first @ second.T) == pytest.approx(cosine, abs=1e-5)


def test_a_saved_judge_comes_back_to_half_precision_and_is_frozen(blank: Judge, tmp_path: Path) -> None:
    save_judge(blank, tmp_path)
    loaded = load_judge(tmp_path)
    for weight, kept in zip(loaded.parameters(), blank.parameters(), strict=True):
        assert torch.equal(weight, kept.half().float())
        assert not weight.requires_grad
    assert (tmp_path / "model.safetensors").stat().st_size <= SIZE_LIMIT


def test_a_missing_judge_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"config\.json"):
        load_judge(tmp_path)


def test_damaged_judges_are_errors(blank: Judge, tmp_path: Path) -> None:
    save_judge(blank, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    weights = tmp_path / "model.safetensors"
    save_file(whole | {"core.bias": torch.tensor([float("nan")])}, weights)
    with pytest.raises(CorruptError, match="not finite"):
        load_judge(tmp_path)
    save_file({name: weight for name, weight in whole.items() if name != "core.bias"}, weights)
    with pytest.raises(CorruptError, match=r"core\.bias"):
        load_judge(tmp_path)
    weights.write_bytes(b"\x00" * 40)
    with pytest.raises(CorruptError):
        load_judge(tmp_path)


def test_a_judge_of_another_world_is_refused(blank: Judge, tmp_path: Path) -> None:
    save_judge(blank, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"grid": 8}))
    with pytest.raises(CorruptError, match="another world"):
        load_judge(tmp_path)
    path.write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        load_judge(tmp_path)
