"""Blends whose weights are learnt, on an untrained base of a few thousand parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from lora_pipeline.adapters import save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.blocks import block_of
from lora_pipeline.adapters.composition import Part, blend, digest
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.recipes import Recipe
from lora_pipeline.adapters.targets import UNET
from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.injection import inject
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.denoising import Denoiser
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.training.blending import LearntBlend, learnt_blend
from lora_pipeline.training.fit import Fit, Scene
from lora_pipeline.training.trajectories import attached, trajectory

pytestmark = pytest.mark.filterwarnings("default::FutureWarning")
PROMPTS = {"zorp": ["a <zorp> creature"], "sticker": ["a dog", "a creature"]}


@pytest.fixture
def base(tmp_path: Path) -> Components:
    made: Components = tiny.components(tmp_path / "tokenizer")
    return made


def drawn(base: Components, seed: int, globs: list[str], token: str | None = None) -> Adapter:
    """Factors large enough to matter to an untrained base."""
    source = torch.Generator().manual_seed(seed)
    factors = {}
    for prefix, model in base.models.items():
        targets = inject.select_targets(model, prefix, globs if prefix == UNET else ["*q_proj"])
        inject.inject_new(model, prefix, targets, "new", rank=2, alpha=2.0, generator=source)
        for target, each in inject.collect(model, prefix, "new").items():
            up = torch.randn(each.up.shape, generator=source)
            factors[target] = LoraFactors(each.down, up, 2.0)
        inject.remove(model)
    if token is None:
        return Adapter(factors)
    widths = [encoder.config.hidden_size for _, encoder in base.readers.values()]
    rows = [{token: torch.randn(1, width, generator=source)} for width in widths]
    return Adapter(factors, rows[0], embeddings_2=rows[1] if len(rows) > 1 else {})


@pytest.fixture
def parts(base: Components) -> list[Part]:
    wide = ["*attn*.to_?", "*.conv1"]
    return [("zorp", drawn(base, 1, wide, "<zorp>"), 1.0), ("sticker", drawn(base, 2, ["*attn*"]), 0.8)]


def fit(method: str, granularity: str, **changes: Any) -> Fit:
    values: dict[str, Any] = {"draws": 2, "steps": 8, "learning_rate": 0.05, "regularisation": 0.0, "seed": 3}
    return Fit(method, granularity, **{"prompts": PROMPTS, **values, **changes})


def learn(base: Components, parts: list[Part], fit: Fit, recipe: Recipe | None = None) -> LearntBlend:
    return learnt_blend(base, parts, recipe or Recipe(), fit, lambda *_: None)


def loss(base: Components, parts: list[Part], adapter: Adapter) -> float:
    """How far one adapter is from what each part does alone on its prompts, over the trajectories of each."""
    weights = {name: weight for name, _, weight in parts}
    total = 0.0
    for name in weights:
        with attached(base, parts, False) as mine:
            moments = list(trajectory(mine, weights, weights, Scene(name, (name,), ()), PROMPTS[name], 3))
        with attached(base, [("all", adapter, 1.0)], False) as mine, torch.no_grad():
            denoise, prompts = Denoiser(mine), encode_prompts(mine, PROMPTS[name])
            said = [denoise(each.latents, each.timestep, prompts) for each in moments]
        pairs = zip(said, moments, strict=True)
        total += sum(float((one - each.prediction).square().mean()) for one, each in pairs) / len(moments)
    return total


def state(base: Components) -> dict[str, Tensor]:
    states = {name: model.state_dict() for name, model in base.models.items()}
    return {f"{name}.{key}": value.clone() for name, each in states.items() for key, value in each.items()}


KINDS = [
    ("least_squares", "adapter"), ("least_squares", "block"),
    ("distill", "adapter"), ("distill", "block"), ("distill", "column"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "granularity"), KINDS)
def test_the_blend_is_nearer_to_its_parts_than_their_sum_and_the_base_is_left_alone(
    base: Components, parts: list[Part], method: str, granularity: str
) -> None:
    before, size = state(base), len(base.tokenizer)
    steps: list[tuple[int, float | None]] = []
    asked = fit(method, granularity, steps=20)
    found = learnt_blend(base, parts, Recipe(), asked, lambda *told: steps.append(told))
    after = state(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert len(base.tokenizer) == size
    assert [step for step, _ in steps] == list(range(1, asked.work() + 1))
    assert loss(base, parts, found.composition.adapter) < 0.97 * loss(base, parts, blend(parts, Recipe()).adapter)


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "sd1"])
def test_blends_are_learnt_on_every_kind_of_base(tmp_path: Path, kind: str) -> None:
    base = tiny.components(tmp_path / "tokenizer", kind=kind)
    parts = [("zorp", drawn(base, 1, ["*attn*.to_?"], "<zorp>"), 1.0), ("sticker", drawn(base, 2, ["*attn*"]), 0.8)]
    found = learn(base, parts, fit("distill", "column", steps=20))
    assert loss(base, parts, found.composition.adapter) < 0.97 * loss(base, parts, blend(parts, Recipe()).adapter)


@pytest.mark.parametrize(("method", "granularity"), KINDS)
def test_the_seed_decides_every_byte(
    tmp_path: Path, base: Components, parts: list[Part], method: str, granularity: str
) -> None:
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        made = learn(base, parts, fit(method, granularity, seed=seed, draws=1, steps=2)).composition.adapter
        save_adapter(made, tmp_path / name)
    one, again, other = ((tmp_path / name).read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


@pytest.mark.parametrize("granularity", ["adapter", "block"])
def test_the_result_is_the_sum_at_the_learnt_weights(base: Components, parts: list[Part], granularity: str) -> None:
    found = learn(base, parts, fit("least_squares", granularity))
    adapter = found.composition.adapter
    for target, factors in adapter.factors.items():
        expected = torch.zeros_like(factors.delta())
        for name, part, weight in parts:
            if target not in part.factors:
                continue
            if target.startswith("unet"):
                learnt = found.weights[name]
                weight = learnt[block_of(target) if granularity == "block" else "everywhere"]
            expected += weight * part.factors[target].delta()
        torch.testing.assert_close(factors.delta(), expected, rtol=1e-5, atol=1e-5)
    assert adapter.provenance["fit"]["weights"] == found.weights  # type: ignore[index,call-overload]
    assert [each["sha256"] for each in adapter.provenance["parents"]] == [digest(each) for _, each, _ in parts]  # type: ignore[index,union-attr,call-overload]


def test_columns_fold_into_the_factors(base: Components, parts: list[Part]) -> None:
    """On its own each part differs from what came out by a factor an input column."""
    found = learn(base, parts[:1], fit("distill", "column", prompts={"zorp": PROMPTS["zorp"]}, learning_rate=0.3))
    for target, factors in found.composition.adapter.factors.items():
        before = parts[0][1].factors[target]
        ratio = (factors.delta() / before.delta()).transpose(0, 1).flatten(1)  # (columns, the rest)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
        if target.startswith("text"):
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-3, atol=1e-3)


ALONE = {"zorp": PROMPTS["zorp"]}


@pytest.mark.parametrize("granularity", ["adapter", "block"])
def test_an_adapter_alone_keeps_its_weight(base: Components, parts: list[Part], granularity: str) -> None:
    found = learn(base, [("zorp", parts[0][1], 0.7)], fit("least_squares", granularity, prompts=ALONE))
    assert all(weight == pytest.approx(0.7, abs=1e-4) for weight in found.weights["zorp"].values())


@pytest.mark.parametrize("granularity", ["adapter", "block", "column"])
def test_where_learning_starts_an_adapter_alone_has_nothing_to_learn(
    base: Components, parts: list[Part], granularity: str
) -> None:
    asked = fit("distill", granularity, prompts=ALONE, steps=1)
    assert learn(base, [("zorp", parts[0][1], 0.7)], asked).losses[0] < 1e-10


def test_several_adapters_together_are_asked_for_what_each_changes_alone(base: Components, parts: list[Part]) -> None:
    weights = {name: weight for name, _, weight in parts}
    scene = Scene("zorp+sticker", ("zorp", "sticker"), ())
    with attached(base, parts, False) as mine, torch.no_grad():
        [prompt] = PROMPTS["zorp"]
        for moment in trajectory(mine, weights, weights, scene, [prompt], 3):
            said = []
            for chosen in ([], ["zorp"], ["sticker"]):
                now = {name: weight * (name in chosen) for name, weight in weights.items()}
                inject.set_weights(mine.unet, now)
                inject.set_weights(mine.text_encoder, now)
                said.append(mine.unet(moment.latents, moment.timestep, encode_prompts(mine, [prompt]).states).sample)
            torch.testing.assert_close(moment.prediction, said[1] + said[2] - said[0], rtol=1e-4, atol=1e-5)


def test_of_prompts_for_all_together_the_given_weights_are_the_least_squares(
    base: Components, parts: list[Part]
) -> None:
    asked = fit("least_squares", "block", prompts={"zorp+sticker": PROMPTS["zorp"]})
    found = learn(base, parts, asked)
    for name, _, weight in parts:
        assert all(each == pytest.approx(weight, rel=1e-3) for each in found.weights[name].values())


def test_a_change_of_gauge_changes_no_weight(base: Components, parts: list[Part]) -> None:
    def turned(factors: LoraFactors) -> LoraFactors:
        mix = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
        down = torch.einsum("ij,j...->i...", mix, factors.down)
        return LoraFactors(down, torch.einsum("oj...,jk->ok...", factors.up, mix.inverse()), factors.alpha)

    other = [(n, dataclasses.replace(a, factors={t: turned(f) for t, f in a.factors.items()}), w) for n, a, w in parts]
    one, two = (learn(base, each, fit("least_squares", "adapter")).weights for each in (parts, other))
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-3)


def test_text_encoders_keep_the_given_weights_and_the_rank_is_cut(base: Components, parts: list[Part]) -> None:
    recipe = Recipe(text_encoder_weights={"zorp": -0.5}, rank=RankRule("rank", 1))
    adapter = learn(base, parts, fit("least_squares", "block"), recipe).composition.adapter
    assert {each.down.shape[0] for each in adapter.factors.values()} == {1}
    full = blend(parts, Recipe(text_encoder_weights={"zorp": -0.5}, rank=RankRule("rank", 1))).adapter
    for target in (each for each in full.factors if each.startswith("text")):
        torch.testing.assert_close(adapter.factors[target].delta(), full.factors[target].delta())


@pytest.mark.parametrize(
    ("recipe", "where"),
    [(Recipe("ties", density=0.5), "method"), (Recipe(block_weights={"zorp": {"M00": 0.0}}), "block_weights")],
)
def test_a_recipe_that_fixes_what_is_learnt_is_refused(
    base: Components, parts: list[Part], recipe: Recipe, where: str
) -> None:
    with pytest.raises(ParamsError) as refused:
        learn(base, parts, fit("distill", "block"), recipe)
    assert refused.value.where == where


def test_an_adapter_that_leaves_the_unet_alone_has_nothing_to_learn(base: Components, parts: list[Part]) -> None:
    text = {target: each for target, each in parts[1][1].factors.items() if target.startswith("text")}
    with pytest.raises(ParamsError, match="sticker"):
        learn(base, [parts[0], ("sticker", Adapter(text, {}), 1.0)], fit("distill", "block"))


def test_an_adapter_of_another_base_is_refused_and_nothing_stays_injected(base: Components, parts: list[Part]) -> None:
    before = state(base)
    odd = Adapter({"unet.conv_in": LoraFactors(torch.ones(1, 9, 3, 3), torch.ones(8, 1, 1, 1), 1.0)}, {})
    with pytest.raises(CorruptError):
        learn(base, [parts[0], ("sticker", odd, 1.0)], fit("distill", "block"))
    assert state(base).keys() == before.keys()
