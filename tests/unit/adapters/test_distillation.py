"""An adapter out of a tuned model, against the difference of the two models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters.distillation import Recipe, clamped, distil
from lora_pipeline.adapters.formats import native
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.spectrum import low_rank
from lora_pipeline.adapters.storage import tensor_bytes, write_tensors
from lora_pipeline.adapters.weights import Weights, open_weights
from lora_pipeline.errors import CorruptError, UsageError

Tensors = dict[str, Tensor]
SHAPES = {
    "unet.conv_in.weight": (8, 4, 3, 3),
    "unet.conv_in.bias": (8,),
    "unet.mid_block.point.weight": (6, 8, 1, 1),
    "unet.mid_block.to_q.weight": (9, 7),
    "unet.mid_block.single.weight": (1, 1),
    "unet.norm.weight": (8,),
    "text_encoder.text_model.embeddings.token_embedding.weight": (10, 5),
    "text_encoder.text_model.embeddings.position_embedding.weight": (4, 5),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": (11, 5),
}
TABLE = "text_encoder.text_model.embeddings.token_embedding.weight"
MATRICES = {name for name, shape in SHAPES.items() if len(shape) > 1 and "embedding" not in name}
FULL = Recipe(RankRule("rank", 100))
Write = Callable[[str, Tensors], Weights]


@pytest.fixture
def model(generator: torch.Generator) -> Tensors:
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A diffusers folder with the tensors of both models."""

    def written(folder: str, tensors: Tensors) -> Weights:
        for prefix, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            mine = {name.removeprefix(f"{prefix}."): each for name, each in tensors.items() if name.startswith(prefix)}
            write_tensors(tmp_path / folder / prefix / f"{file}.safetensors", mine, {})
        return open_weights(tmp_path / folder)

    return written


@pytest.fixture
def changed(generator: torch.Generator) -> Callable[[Tensors, set[str]], Tensors]:
    def change(model: Tensors, names: set[str]) -> Tensors:
        return {
            name: each + 0.1 * torch.randn(each.shape, generator=generator) if name in names else each.clone()
            for name, each in model.items()
        }

    return change


def test_full_rank_gives_the_whole_change(model: Tensors, write: Write, changed: Callable[..., Tensors]) -> None:
    tuned = changed(model, MATRICES)
    extraction = distil(write("base", model), write("tuned", tuned), FULL, {"code": "1"})
    assert {f"{target}.weight" for target in extraction.adapter.factors} == MATRICES
    assert not extraction.left_out
    assert extraction.residual < 1e-6
    assert extraction.adapter.provenance == {"code": "1", "residual": 0.0}
    for target, factors in extraction.adapter.factors.items():
        delta = tuned[f"{target}.weight"] - model[f"{target}.weight"]
        assert factors.alpha == factors.rank
        assert factors.delta().shape == delta.shape
        assert float((factors.delta() - delta).norm() / delta.norm()) < 1e-6


@pytest.mark.parametrize("rule", [RankRule("rank", 2), RankRule("energy", 0.7), RankRule("error", 0.5)])
def test_each_layer_keeps_what_the_rule_allows_of_its_singular_values(
    rule: RankRule, model: Tensors, write: Write, changed: Callable[..., Tensors]
) -> None:
    tuned = changed(model, MATRICES)
    extraction = distil(write("base", model), write("tuned", tuned), Recipe(rule), {})
    lost = total = 0.0
    for target, cut in extraction.layers.items():
        delta = (tuned[f"{target}.weight"] - model[f"{target}.weight"]).double().flatten(1)
        values = torch.linalg.svdvals(delta)
        assert cut.rank == rule.choose(values) == extraction.adapter.factors[target].rank
        assert cut.residual == pytest.approx(float(values[cut.rank :].norm() / values.norm()), rel=1e-4, abs=1e-6)
        assert cut.norm == pytest.approx(float(delta.norm()), rel=1e-6)
        lost, total = lost + float(values[cut.rank :].square().sum()), total + float(values.square().sum())
    assert extraction.residual == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_layers_without_a_change_get_no_factors(model: Tensors, write: Write, changed: Callable[..., Tensors]) -> None:
    tuned = changed(model, {"unet.mid_block.to_q.weight"})
    extraction = distil(write("base", model), write("tuned", tuned), FULL, {})
    assert set(extraction.adapter.factors) == {"unet.mid_block.to_q"}


def test_changes_that_factors_cannot_hold_are_told(
    model: Tensors, write: Write, changed: Callable[..., Tensors]
) -> None:
    tuned = changed(model, set(SHAPES))
    extraction = distil(write("base", model), write("tuned", tuned), FULL, {})
    assert extraction.left_out.keys() == SHAPES.keys() - MATRICES
    for name, norm in extraction.left_out.items():
        assert norm == pytest.approx(float((tuned[name] - model[name]).norm()), rel=1e-5)


def test_globs_choose_the_layers_and_the_rest_is_told(
    model: Tensors, write: Write, changed: Callable[..., Tensors]
) -> None:
    tuned = changed(model, MATRICES)
    recipe = Recipe(RankRule("rank", 1), targets=("unet.mid_block.*", "*.fc1"))
    extraction = distil(write("base", model), write("tuned", tuned), recipe, {})
    assert set(extraction.left_out) == {"unet.conv_in.weight"}
    assert extraction.layers.keys() | {"unet.conv_in"} == {name.removesuffix(".weight") for name in MATRICES}


def test_half_precision_is_subtracted_in_single(model: Tensors, write: Write) -> None:
    base = {name: each.half() for name, each in model.items()}
    tuned = {name: each.float() + 1e-5 for name, each in base.items()}  # lost between two halves
    extraction = distil(write("base", base), write("tuned", tuned), FULL, {})
    delta = extraction.adapter.factors["unet.mid_block.to_q"].delta()
    assert torch.allclose(delta, torch.full_like(delta, 1e-5), rtol=0.05)


def test_new_tokens_become_embeddings(model: Tensors, write: Write, generator: torch.Generator) -> None:
    tuned = model | {"unet.conv_in.weight": model["unet.conv_in.weight"] + 1, TABLE: model[TABLE].clone()}
    tuned[TABLE] = torch.cat([model[TABLE], torch.randn(3, 5, generator=generator)])
    tuned[TABLE][9] += 1
    ids = {"<zorp>": [10, 12], "<a>": [9]}
    extraction = distil(write("base", model), write("tuned", tuned), FULL, {}, tokens=ids)
    assert torch.equal(extraction.adapter.embeddings["<zorp>"], tuned[TABLE][[10, 12]])
    assert torch.equal(extraction.adapter.embeddings["<a>"], tuned[TABLE][[9]])
    assert extraction.left_out == {TABLE: pytest.approx(float(tuned[TABLE][11].norm()))}
    with pytest.raises(CorruptError, match="13 rows"):
        distil(write("base", model), write("tuned", tuned), FULL, {}, tokens={"<zorp>": [13]})


def test_the_same_models_give_the_same_bytes(model: Tensors, write: Write, changed: Callable[..., Tensors]) -> None:
    tuned = changed(model, MATRICES)
    recipe = Recipe(RankRule("rank", 2), alpha=1.0)
    one, other = (
        native.render(distil(write("base", model), write("tuned", tuned), recipe, {}).adapter) for _ in range(2)
    )
    assert one[1] == other[1]
    assert {name: tensor_bytes(each) for name, each in one[0].items()} == {
        name: tensor_bytes(each) for name, each in other[0].items()
    }


def test_any_alpha_is_the_same_change(model: Tensors, write: Write, changed: Callable[..., Tensors]) -> None:
    tuned = changed(model, MATRICES)
    plain = distil(write("base", model), write("tuned", tuned), Recipe(RankRule("rank", 3)), {}).adapter
    asked = distil(write("base", model), write("tuned", tuned), Recipe(RankRule("rank", 3), alpha=0.5), {}).adapter
    for target, factors in asked.factors.items():
        assert factors.alpha == 0.5
        assert torch.allclose(factors.delta(), plain.factors[target].delta(), rtol=1e-5, atol=1e-7)


def test_progress_is_told_to_the_end(model: Tensors, write: Write, changed: Callable[..., Tensors]) -> None:
    told: list[int] = []
    distil(write("base", model), write("tuned", changed(model, MATRICES)), FULL, {}, advance=told.append)
    assert told == list(range(1, len(SHAPES) + 1))


@pytest.mark.parametrize("quantile", [0.9, 0.99, 1.0])
def test_the_clamp_is_the_one_other_programs_make(quantile: float, generator: torch.Generator) -> None:
    """U S and V of a plain decomposition, both clamped to the quantile of all their entries; signs are a choice."""
    delta = 0.01 * torch.randn(40, 30, generator=generator)
    found = clamped(delta, low_rank(delta, RankRule("rank", 6)), quantile)
    left, values, right = (each.float() for each in torch.linalg.svd(delta.double(), full_matrices=False))
    signs = (right[:6] * found.down).sum(dim=1).sign()
    up, down = left[:, :6] * values[:6] * signs, right[:6] * signs[:, None]
    bound = torch.quantile(torch.cat([up.flatten(), down.flatten()]), quantile)
    up, down = up.clamp(-bound, bound), down.clamp(-bound, bound)
    assert torch.allclose(found.up, up, atol=1e-6)
    assert torch.allclose(found.down, down, atol=1e-6)
    assert found.residual == pytest.approx(float((delta - up @ down).norm() / delta.norm()), rel=1e-4)


def test_a_clamped_extraction_tells_what_the_clamp_costs(
    model: Tensors, write: Write, changed: Callable[..., Tensors]
) -> None:
    weights = write("base", model), write("tuned", changed(model, MATRICES))
    clean = distil(*weights, Recipe(RankRule("rank", 4)), {})
    cut = distil(*weights, Recipe(RankRule("rank", 4), clamp_quantile=0.9), {})
    assert cut.residual > clean.residual


@pytest.mark.parametrize(
    ("edit", "key", "said"),
    [
        ({"unet.mid_block.to_q.weight": torch.ones(9, 8)}, "to_q", r"\(9, 8\) in the tuned model and \(9, 7\)"),
        ({"unet.add_embedding.linear_1.weight": torch.ones(2, 2)}, "add_embedding", "in the tuned model alone"),
        ({TABLE: torch.ones(9, 5)}, "token_embedding", "two architectures"),
        ({TABLE: torch.ones(12, 6)}, "token_embedding", "two architectures"),
        ({"unet.conv_in.weight": torch.full((8, 4, 3, 3), float("nan"))}, "conv_in", "NaN"),
        ({"unet.conv_in.bias": torch.full((8,), float("inf"))}, "conv_in.bias", "NaN or infinity"),
        ({}, "the tuned model", "changes no layer"),
        ({"unet.conv_in.bias": torch.ones(8)}, "the tuned model", "1 other parameters differ"),
    ],
)
def test_models_that_are_no_pair_are_refused(edit: Tensors, key: str, said: str, model: Tensors, write: Write) -> None:
    with pytest.raises(CorruptError, match=said) as caught:
        distil(write("base", model), write("tuned", model | edit), FULL, {})
    assert key in caught.value.where


def test_a_parameter_that_the_tuned_model_lacks_is_named(model: Tensors, write: Write) -> None:
    tuned = {name: each for name, each in model.items() if name != "unet.norm.weight"}
    with pytest.raises(CorruptError, match="in the base alone") as caught:
        distil(write("base", model), write("tuned", tuned), FULL, {})
    assert caught.value.where == "unet.norm.weight"


def test_counters_are_no_parameters(model: Tensors, write: Write, changed: Callable[..., Tensors]) -> None:
    """Older text encoders store their position ids."""
    ids = {"text_encoder.embeddings.position_ids": torch.arange(4)}
    extraction = distil(write("base", model | ids), write("tuned", changed(model, MATRICES)), FULL, {})
    assert len(extraction.layers) == len(MATRICES)


def test_a_glob_without_a_layer_and_a_quantile_out_of_range_are_refused(model: Tensors, write: Write) -> None:
    with pytest.raises(UsageError, match="matches no layer"):
        distil(write("base", model), write("tuned", model), Recipe(RankRule("rank", 1), ("*.to_v",)), {})
    for quantile in (0.5, 1.01, float("nan")):
        with pytest.raises(UsageError, match="clamp"):
            Recipe(RankRule("rank", 1), clamp_quantile=quantile)
