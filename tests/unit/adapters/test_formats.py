"""All file formats: what goes in comes out, and what is wrong is refused by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_pipeline.adapters import load_adapter, save_adapter
from lora_pipeline.adapters.adapter import Adapter, check_base
from lora_pipeline.adapters.formats import WRITERS, diffusers, native, save
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.storage import write_tensors
from lora_pipeline.errors import CorruptError

Make = Callable[..., Adapter]
TARGET = "unet.mid_block.attentions.0.to_q"
GOLDEN = "21da6214721636185e725b3ac56c3cd96e667111e478c7fb9b781266c944bed5"

# They hold the layers of some bases, or no layers, and have tests of their own.
PARTIAL = {"cloneofsimo", "learned_embeds", "emb_params", "a1111"}


def assert_same(one: Adapter, other: Adapter) -> None:
    assert one.factors.keys() == other.factors.keys()
    for target, factors in one.factors.items():
        assert torch.equal(factors.down, other.factors[target].down)
        assert torch.equal(factors.up, other.factors[target].up)
        assert factors.alpha == other.factors[target].alpha
    assert one.embeddings.keys() == other.embeddings.keys()
    for token, rows in one.embeddings.items():
        assert torch.equal(rows, other.embeddings[token])
    assert one.provenance == other.provenance


@pytest.mark.parametrize("form", sorted(WRITERS.keys() - PARTIAL))
def test_every_format_gives_back_what_it_was_given(tmp_path: Path, make_adapter: Make, form: str) -> None:
    adapter = make_adapter(3, tokens=("<a>", "b.c"), base="b")
    save(adapter, tmp_path / "x", form)
    assert_same(load_adapter(tmp_path / "x"), adapter)


@pytest.mark.parametrize("form", sorted(WRITERS.keys() - PARTIAL))
def test_an_adapter_may_be_tokens_only(tmp_path: Path, form: str) -> None:
    adapter = Adapter({}, {"<a>": torch.ones(1, 4)})
    save(adapter, tmp_path / "x", form)
    assert_same(load_adapter(tmp_path / "x"), adapter)


def test_native_bytes_never_change(tmp_path: Path) -> None:
    factors = LoraFactors(torch.arange(4.0).reshape(2, 2), torch.ones(3, 2), 0.1)
    save_adapter(Adapter({TARGET: factors}, {"<a>": torch.ones(1, 2)}, {"b": [1], "a": None}), tmp_path / "x")
    assert hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest() == GOLDEN


def broken_native(change: Callable[[dict[str, torch.Tensor], dict[str, object]], object]) -> tuple[object, ...]:
    factors = LoraFactors(torch.ones(2, 4), torch.ones(6, 2), 1.0)
    tensors, metadata = native.render(Adapter({TARGET: factors}))
    document = json.loads(metadata["lora_pipeline"])
    change(tensors, document)
    return tensors, {"lora_pipeline": json.dumps(document)}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.pop(f"{TARGET}.up"),
        lambda tensors, _: tensors.update({"spare": torch.ones(1)}),
        lambda tensors, _: tensors.update({f"{TARGET}.up": torch.ones(6, 3)}),
        lambda _, document: document.update(format=2),
        lambda _, document: document.pop("alphas"),
        lambda _, document: document.update(alphas=[]),
        lambda _, document: document["alphas"].update({TARGET: "1"}),
        lambda _, document: document["alphas"].update({TARGET: math.nan}),
        lambda _, document: document["alphas"].update({TARGET: 10**400}),
        lambda _, document: document.update(provenance=[]),
        lambda _, document: document.update(provenance={"loss": math.nan}),
        lambda _, document: document.update(provenance={"loss": math.inf}),
        lambda tensors, _: tensors.update({"embedding.<a>": torch.ones(3)}),
    ],
)
def test_a_broken_native_file_is_refused_by_file_and_key(tmp_path: Path, change: Callable[..., object]) -> None:
    tensors, metadata = broken_native(change)
    write_tensors(tmp_path / "x", tensors, metadata)  # type: ignore[arg-type]
    with pytest.raises(CorruptError) as caught:
        load_adapter(tmp_path / "x")
    assert caught.value.where.startswith(f"{tmp_path / 'x'}: ")


def test_a_file_of_no_format_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"conv_in.weight": torch.ones(1)}, {})
    with pytest.raises(CorruptError, match="no adapter"):
        load_adapter(tmp_path / "x")


@pytest.mark.parametrize(
    "names",
    [
        ("unet.a.lora_A.weight",),
        ("unet.a.lora_A.weight", "unet.b.lora_B.weight"),
        ("unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.lora_magnitude_vector"),
        ("text_encoder_3.a.lora_A.weight", "text_encoder_3.a.lora_B.weight"),
    ],
)
def test_a_broken_diffusers_file_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_tensors(tmp_path / "x", {name: torch.ones(2, 2) for name in names}, {})
    with pytest.raises(CorruptError):
        load_adapter(tmp_path / "x")


def parsed(config: dict[str, object] | None, path: str = "a.to_q", model: str = "unet") -> float:
    tensors = {
        f"{model}.{path}.lora_A.weight": torch.ones(4, 3),
        f"{model}.{path}.lora_B.weight": torch.ones(5, 4),
    }
    metadata = {} if config is None else {"lora_adapter_metadata": json.dumps(config)}
    (factors,) = diffusers.parse(tensors, metadata).factors.values()
    return factors.alpha


def test_without_metadata_alpha_is_the_rank() -> None:
    assert parsed(None) == 4.0


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [("a.to_q", 7.0), ("to_q", 7.0), ("^a.to_q", 7.0), ("^to_q", 2.0), ("o_q", 2.0), ("b.to_q", 2.0)],
)
def test_alpha_patterns_follow_pefts_rule(pattern: str, alpha: float) -> None:
    assert parsed({"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 7}}) == alpha


def test_rank_stabilised_scaling_divides_by_the_root_of_the_rank() -> None:
    assert parsed({"unet.lora_alpha": 3, "unet.use_rslora": True}) / 4 == pytest.approx(3 / math.sqrt(4))


def test_kinds_that_are_not_plain_lora_are_refused() -> None:
    with pytest.raises(CorruptError, match="use_dora"):
        parsed({"unet.lora_alpha": 3, "unet.use_dora": True})


def test_text_encoder_names_get_their_level_back() -> None:
    tensors = {"text_encoder.encoder.a.lora_A.weight": torch.ones(1, 3)}
    tensors["text_encoder.encoder.a.lora_B.weight"] = torch.ones(5, 1)
    assert set(diffusers.parse(tensors, {}).factors) == {"text_encoder.text_model.encoder.a"}


def test_names_that_are_no_targets_are_refused() -> None:
    with pytest.raises(CorruptError, match="vae"):
        Adapter({"vae.a": LoraFactors(torch.ones(1, 1), torch.ones(1, 1), 1.0)})


def test_an_adapter_of_another_base_is_refused_and_one_that_does_not_say_is_not() -> None:
    check_base("x", Adapter({}), "b")
    check_base("x", Adapter({}, provenance={"base": "b"}), "b")
    with pytest.raises(CorruptError, match="base") as caught:
        check_base("x", Adapter({}, provenance={"base": "c"}), "b")
    assert caught.value.exit_code == 5
