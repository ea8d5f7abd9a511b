"""Composing as a command: from params.yaml and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_pipeline.adapters import load_adapter, save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.composition import Part, blend
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.recipes import Recipe
from lora_pipeline.errors import ParamsError, UsageError
from stages.compose import by_hand, compose, of_blend

ATTENTION = "unet.mid_block.attentions.0.proj_in"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SHIPPED = (Path(__file__).parents[3] / "params.yaml").read_text(encoding="utf-8")


def drawn(seed: int, token: str) -> Adapter:
    source = torch.Generator().manual_seed(seed)
    factors = {
        target: LoraFactors(torch.randn(3, 6, generator=source), torch.randn(5, 3, generator=source), 2.0)
        for target in (ATTENTION, TEXT)
    }
    return Adapter(factors, {token: torch.randn(1, 4, generator=source)})


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """Two adapters, `zorp` and `sticker`, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PIPE_TRACKING", "off")
    parts = [("zorp", drawn(1, "<z>"), 0.9), ("sticker", drawn(2, "<s>"), 1.1)]
    for name, adapter, _ in parts:
        save_adapter(adapter, Path(f"{name}.safetensors"))
    return parts


def same(one: Adapter, other: Adapter) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(factors.delta(), other.factors[target].delta()) for target, factors in one.factors.items()
    )


OUT = Path("out.safetensors")
FILES = ["zorp.safetensors=0.9", "sticker.safetensors=1.1"]


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({}, Recipe()),
        ({"rank": 2}, Recipe(rank=RankRule("rank", 2))),
        ({"error": 0.3, "max_rank": 4}, Recipe(rank=RankRule("error", 0.3, 4))),
        ({"method": "interpolate", "at": 0.3}, Recipe("interpolate", at=0.3)),
        ({"method": "ties", "density": 0.4}, Recipe("ties", density=0.4)),
        ({"method": "dare", "density": 0.4, "seed": 5}, Recipe("dare", density=0.4, seed=5)),
        ({"text_encoder_weight": ["zorp=0"]}, Recipe(text_encoder_weights={"zorp": 0.0})),
        ({"block_weights": ["zorp=M00:0.5"]}, Recipe(block_weights={"zorp": {"M00": 0.5}})),
    ],
)
def test_by_hand_options_are_the_recipe(parts: list[Part], options: dict[str, Any], recipe: Recipe) -> None:
    compose(OUT, FILES, **options)
    made, expected = load_adapter(OUT), blend(parts, recipe).adapter
    assert same(made, expected)
    assert made.provenance == json.loads(json.dumps(expected.provenance))
    assert made.embeddings.keys() == {"<z>", "<s>"}


@pytest.mark.parametrize(
    ("edits", "recipe", "turned"),
    [
        ({}, Recipe(), False),
        ({"method: sum": "method: dare", "density: null": "density: 0.4"}, Recipe("dare", density=0.4, seed=7), False),
        (
            {"method: sum": "method: interpolate", "path: null": "path: [zorp, sticker]", "at: null": "at: 0.3"},
            Recipe("interpolate", at=0.3),
            True,
        ),
        (
            {"text_encoder_weights: {}": "text_encoder_weights: {zorp: 0}", "rank: null": "rank: {energy: 0.8}"},
            Recipe(text_encoder_weights={"zorp": 0.0}, rank=RankRule("energy", 0.8)),
            False,
        ),
    ],
)
def test_a_blend_of_params_is_the_recipe(
    parts: list[Part], edits: dict[str, str], recipe: Recipe, turned: bool
) -> None:
    """Adapters come in the order of their names, on a path in its own."""
    before, _, after = SHIPPED.partition("blends:")
    for old, new in edits.items():
        assert old in after
        after = after.replace(old, new, 1)
    Path("params.yaml").write_text(f"{before}blends:{after}", encoding="utf-8")
    compose(OUT, blend="zorp-sticker", adapters=Path())
    expected = blend(parts if turned else parts[::-1], recipe).adapter
    assert same(load_adapter(OUT), expected)
    assert load_adapter(OUT).provenance == expected.provenance


def test_the_report_tells_every_layer(parts: list[Part]) -> None:
    compose(OUT, FILES, rank=2, report=Path("report.json"))
    told = json.loads(Path("report.json").read_text("utf-8"))
    layers = blend(parts, Recipe(rank=RankRule("rank", 2))).layers
    assert told["layers"].keys() == {ATTENTION, TEXT}
    assert told["layers"][TEXT]["rank"] == 2
    assert told["layers"][TEXT]["error"] == pytest.approx(layers[TEXT].residual, rel=1e-4)
    assert Path("report.png").is_file()


@pytest.mark.usefixtures("parts")
def test_renamed_tokens_and_losses_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(drawn(3, "<z>"), Path("other.safetensors"))
    compose(OUT, ["zorp.safetensors", "other.safetensors"], rank=1, rename_tokens=True)
    said = capsys.readouterr().out
    assert "<z> of other is <z-2>" in said
    assert f"{load_adapter(OUT).provenance['residual']:.1%} of the change" in said
    assert load_adapter(OUT).embeddings.keys() == {"<z>", "<z-2>"}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blend": "x"},
        {"files": FILES, "blend": "x", "adapters": Path()},
        {"blend": "x", "adapters": Path(), "rank": 2},
        {"blend": "x", "adapters": Path(), "rename_tokens": True},
        {"files": FILES, "method": "mean"},
        {"files": FILES, "method": "ties"},
        {"files": FILES, "density": 0.5},
        {"files": FILES, "rank": 1, "energy": 0.5},
        {"files": FILES, "energy": 2.0},
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        compose(OUT, **options)


@pytest.mark.usefixtures("parts")
def test_a_collision_leaves_the_old_out_alone() -> None:
    compose(OUT, FILES)
    before = OUT.read_bytes()
    save_adapter(drawn(3, "<z>"), Path("other.safetensors"))
    with pytest.raises(ParamsError, match="<z>"):
        compose(OUT, ["zorp.safetensors", "other.safetensors"])
    assert OUT.read_bytes() == before


PROMPTS = ["zorp=a <z>", "sticker=a = b", "zorp=a <z> at night", "zorp+sticker=both"]
BY_ADAPTER = {"zorp": ["a <z>", "a <z> at night"], "sticker": ["a = b"], "zorp+sticker": ["both"]}


@pytest.mark.usefixtures("parts")
def test_weights_to_be_learnt_are_asked_for_by_hand_and_in_params_alike() -> None:
    told = "granularity: column, draws: 2, steps: 200, learning_rate: 0.02, regularisation: 0.01"
    before, _, after = SHIPPED.partition("blends:")
    after = after.replace("fit: null", f"fit: {{prompts: {json.dumps(BY_ADAPTER)}, {told}}}", 1)
    after = after.replace("method: sum", "method: distill", 1).replace("rank: null", "rank: 3", 1)
    Path("params.yaml").write_text(f"{before}blends:{after}", encoding="utf-8")
    params = of_blend("zorp-sticker", Path())
    options = {"method": "distill", "rank": RankRule("rank", 3), "seed": 7}
    hand = by_hand(FILES, options, PROMPTS, {"granularity": "column", "draws": 2})
    assert params.fit == hand.fit
    assert params.recipe == hand.recipe
    assert params.recipe.method == "sum"
    assert by_hand(FILES, {"method": "least_squares"}, PROMPTS, {}).fit != hand.fit
    assert by_hand(FILES, {"method": "sum"}, [], {}).fit is None


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"prompt": PROMPTS}, "--prompt"),
        ({"learning_rate": 0.1}, "--learning-rate"),
        ({"method": "ties", "density": 0.5, "steps": 3}, "--steps"),
        ({"method": "distill", "prompt": PROMPTS}, "--base"),
        ({"method": "distill"}, "--prompt"),
        ({"method": "distill", "prompt": ["zorp=a"]}, "--prompt"),
        ({"method": "distill", "prompt": [*PROMPTS, "mimo=a"]}, "--prompt"),
        ({"method": "distill", "prompt": [*PROMPTS, "zorp"]}, "zorp"),
        ({"method": "distill", "prompt": PROMPTS, "density": 0.5}, "--density"),
        ({"method": "distill", "prompt": PROMPTS, "learning_rate": 0.0}, "--learning-rate"),
        ({"method": "least_squares", "prompt": PROMPTS, "granularity": "column"}, "--granularity"),
        ({"blend": "x", "adapters": Path(), "files": None, "steps": 2}, "compose"),
    ],
)
def test_learning_that_cannot_be_is_refused_before_anything_is_loaded(options: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError) as refused:
        compose(OUT, **{"files": FILES, **options})
    assert refused.value.where == where
    assert not OUT.exists()
