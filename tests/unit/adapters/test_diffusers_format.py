"""diffusers' files: every spelling there has been, and nothing misread or dropped."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import diffusers, native
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.recognition import recognise
from lora_pipeline.errors import CorruptError

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TO_Q, TO_OUT = f"unet.{ATTENTION}.to_q", f"unet.{ATTENTION}.to_out.0"
CLIP = "encoder.layers.0.self_attn"
Q_PROJ, OUT_PROJ = f"text_encoder.text_model.{CLIP}.q_proj", f"text_encoder.text_model.{CLIP}.out_proj"
DOWN, UP = torch.ones(2, 3), torch.full((4, 2), 2.0)


def file_of(key: str) -> dict[str, Tensor]:
    """Both halves, by the key of the first."""
    other = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace(".down.", ".up.")
    return {key: DOWN, other: UP}


@pytest.mark.parametrize(
    ("key", "target"),
    [
        (f"unet.{ATTENTION}.processor.to_q_lora.down.weight", TO_Q),
        (f"unet.{ATTENTION}.processor.to_out_lora.down.weight", TO_OUT),
        (f"unet.{ATTENTION}.to_out_lora.down.weight", TO_OUT),
        (f"{ATTENTION}.processor.to_q_lora.down.weight", TO_Q),
        (f"{ATTENTION}.processor.to_out_lora.down.weight", TO_OUT),
        (f"unet.{ATTENTION}.processor.add_k_proj_lora.down.weight", f"unet.{ATTENTION}.add_k_proj"),
        (f"text_encoder.text_model.{CLIP}.to_q_lora.down.weight", Q_PROJ),
        (f"text_encoder.text_model.{CLIP}.to_out_lora.down.weight", OUT_PROJ),
        (f"unet.{ATTENTION}.to_q.lora.down.weight", TO_Q),
        (f"unet.{ATTENTION}.processor.to_q.lora.down.weight", TO_Q),
        (f"unet.{ATTENTION}.to_out.0.lora.down.weight", TO_OUT),
        (f"text_encoder.text_model.{CLIP}.q_proj.lora_linear_layer.down.weight", Q_PROJ),
        (f"text_encoder.{CLIP}.out_proj.lora_linear_layer.down.weight", OUT_PROJ),
        (f"unet.{ATTENTION}.to_q.lora_A.weight", TO_Q),
        (f"unet.{ATTENTION}.to_q.lora_A.default.weight", TO_Q),
        (f"unet.{ATTENTION}.to_q.lora_A.default_0.weight", TO_Q),
        (f"{ATTENTION}.to_q.lora_A.weight", TO_Q),
        (f"text_encoder.{CLIP}.q_proj.lora_A.weight", Q_PROJ),
        (f"text_encoder_2.text_model.{CLIP}.q_proj.lora_A.weight", Q_PROJ.replace("encoder.", "encoder_2.", 1)),
        ("text_encoder_2.text_projection.lora_A.weight", "text_encoder_2.text_model.text_projection"),
        ("text_encoder_2.text_projection.lora.down.weight", "text_encoder_2.text_model.text_projection"),
    ],
)
def test_every_spelling_means_its_layer(key: str, target: str) -> None:
    tensors = file_of(key)
    assert recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()}, {}) == "diffusers"
    (found, factors), *others = diffusers.parse(tensors, {}).factors.items()
    assert (found, others) == (target, [])
    assert torch.equal(factors.down, DOWN)
    assert torch.equal(factors.up, UP)
    assert factors.alpha == factors.rank


@pytest.mark.parametrize(
    ("key", "alpha"),
    [
        (f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.alpha"),
        (f"unet.{ATTENTION}.to_q.lora.down.weight", f"unet.{ATTENTION}.to_q.lora.alpha"),
        (f"unet.{ATTENTION}.to_q.lora.down.weight", f"unet.{ATTENTION}.to_q.lora.down.weight.alpha"),
        (f"unet.{ATTENTION}.processor.to_q_lora.down.weight", f"unet.{ATTENTION}.processor.to_q_lora.alpha"),
        (f"unet.{ATTENTION}.processor.to_q_lora.down.weight", f"unet.{ATTENTION}.to_q_lora.down.weight.alpha"),
        (f"text_encoder.{CLIP}.q_proj.lora_linear_layer.down.weight", f"text_encoder.{CLIP}.q_proj.alpha"),
        (
            f"text_encoder.{CLIP}.q_proj.lora_linear_layer.down.weight",
            f"text_encoder.text_model.{CLIP}.to_q_lora.down.weight.alpha",
        ),
    ],
)
def test_an_alpha_beside_the_factors_is_theirs(key: str, alpha: str) -> None:
    tensors = {**file_of(key), alpha: torch.tensor(0.5, dtype=torch.float16)}
    (factors,) = diffusers.parse(tensors, {}).factors.values()
    assert factors.scale == 0.25


def test_eras_may_be_mixed_in_a_file() -> None:
    tensors = file_of(f"{TO_Q}.lora.down.weight") | file_of(f"{TO_OUT}.lora_A.weight")
    tensors |= file_of(f"{Q_PROJ}.lora_linear_layer.down.weight") | file_of(
        f"text_encoder.{CLIP}.out_proj.lora_A.weight"
    )
    assert set(diffusers.parse(tensors, {}).factors) == {TO_Q, TO_OUT, Q_PROJ, OUT_PROJ}


def test_fields_of_a_unet_that_saved_itself_have_no_prefix() -> None:
    config = json.dumps({"r": 2, "lora_alpha": 6, "target_modules": ["to_q"], "peft_type": "LORA"})
    (factors,) = diffusers.parse(
        file_of(f"{ATTENTION}.to_q.lora_A.weight"), {"lora_adapter_metadata": config}
    ).factors.values()
    assert factors.scale == 3.0


def refused(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> CorruptError:
    with pytest.raises(CorruptError) as caught:
        diffusers.parse(tensors, metadata or {})
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({f"{TO_Q}.lora_A.weight": DOWN}, f"{TO_Q}.lora_A.weight"),
        ({f"{TO_Q}.lora_B.weight": DOWN}, f"{TO_Q}.lora_B.weight"),
        ({f"{TO_Q}.lora.down.weight": DOWN, f"{TO_Q}.lora_A.weight": DOWN}, f"{TO_Q}.lora_A.weight"),
        ({f"{TO_Q}.alpha": torch.ones(())}, f"{TO_Q}.alpha"),
        ({f"{TO_Q}.lora_magnitude_vector": torch.ones(4)}, f"{TO_Q}.lora_magnitude_vector"),
        (
            {f"{TO_Q}.lora_A.weight": torch.ones(2, 3), f"{TO_Q}.lora_B.weight": torch.ones(4, 3)},
            f"{TO_Q}.lora_A.weight",
        ),
        ({f"{TO_Q}.lora_A.weight": torch.ones(()), f"{TO_Q}.lora_B.weight": torch.ones(())}, f"{TO_Q}.lora_A.weight"),
        ({**file_of(f"{TO_Q}.lora_A.weight"), f"{TO_Q}.alpha": torch.ones(2)}, f"{TO_Q}.alpha"),
        (file_of("transformer.x.lora_A.weight"), "transformer.x.lora_A.weight"),
        (file_of("text_encoder_3.x.lora_A.weight"), "text_encoder_3.x.lora_A.weight"),
        ({**file_of(f"{TO_Q}.lora_A.weight"), "vae.conv_in.weight": DOWN}, "vae.conv_in.weight"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_its_key(tensors: dict[str, Tensor], named: str) -> None:
    assert refused(tensors).where == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, f"{TO_Q}.lora_A.weight"),
        ({"use_dora": "yes"}, "unet.use_dora"),
        ({"lora_bias": True}, "unet.lora_bias"),
        ({"bias": "all"}, "unet.bias"),
        ({"modules_to_save": ["conv_in"]}, "unet.modules_to_save"),
        ({"fan_in_fan_out": True}, "unet.fan_in_fan_out"),
        ({"peft_type": "LOHA"}, "unet.peft_type"),
        ({"peft_type": ["LORA"]}, "unet.peft_type"),
        ({"init_lora_weights": "pissa_niter_4"}, "unet.init_lora_weights"),
        ({"r": 8}, "unet.rank_pattern"),
        ({"r": 0}, "unet.r"),
        ({"r": True}, "unet.r"),
        ({"r": 2, "rank_pattern": {"to_q": 3}}, "unet.rank_pattern"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": ["to_q"]}, "unet.rank_pattern"),
        ({"rank_pattern": {"to_q": 2.0}}, "unet.rank_pattern.to_q"),
        ({"lora_alpha": "1"}, "unet.lora_alpha"),
        ({"lora_alpha": None}, "unet.lora_alpha"),
        ({"lora_alpha": 10**400}, "unet.lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_adapter_metadata"),
        ({"alpha_pattern": {"to_q": True}}, "unet.alpha_pattern.to_q"),
        ({"alpha_pattern": {"(a|aa)+$": 1}}, "unet.alpha_pattern"),
        ({"alpha_pattern": {".*to_q": 1}}, "unet.alpha_pattern"),
        ({"alpha_pattern": {"": 1}}, "unet.alpha_pattern"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_its_field(fields: dict[str, Any], named: str | None) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in fields.items()})}
    tensors = file_of(f"{TO_Q}.lora_A.weight")
    if named is None:
        diffusers.parse(tensors, metadata)
    else:
        assert refused(tensors, metadata).where == named


@pytest.mark.parametrize("text", ["{", "[]", "1", "[" * 100_000, '{"unet.r": 1e999}', '{"a": Infinity}'])
@pytest.mark.parametrize("key", ["lora_adapter_metadata", "lora_pipeline"])
def test_metadata_that_is_no_object_is_refused(key: str, text: str) -> None:
    assert refused(file_of(f"{TO_Q}.lora_A.weight"), {key: text}).where == key


def test_a_name_of_a_thousand_alphas_is_a_name() -> None:
    assert refused({"unet.x" + ".alpha" * 5_000: torch.ones(())}).where.startswith("unet.x.alpha.alpha")


def test_many_patterns_and_long_names_take_no_time() -> None:
    config = {"unet.alpha_pattern": {f"{'a.' * 50}{number}": number for number in range(20_000)}}
    tensors = {f"{TO_Q}{number}.lora_{half}.weight": torch.ones(1, 1) for number in range(2_000) for half in "AB"}
    adapter = diffusers.parse(tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert {factors.alpha for factors in adapter.factors.values()} == {8.0}


@pytest.mark.parametrize("end", ["", ".weight", ".default.weight"])
@pytest.mark.parametrize("flagged", [False, True])
def test_dora_is_read_with_or_without_its_flag(end: str, flagged: bool) -> None:
    tensors = {**file_of(f"{TO_Q}.lora_A.weight"), f"{TO_Q}.lora_magnitude_vector{end}": torch.arange(4.0)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True, "unet.r": 2})} if flagged else {}
    adapter = diffusers.parse(tensors, metadata)
    assert torch.equal(adapter.magnitudes[TO_Q], torch.arange(4.0)[:, None])


def test_dora_of_a_convolution_has_one_norm_for_each_output() -> None:
    target = "unet.conv_in"
    factors = LoraFactors(torch.ones(2, 3, 3, 3), torch.ones(4, 2, 1, 1), 1.0)
    adapter = Adapter({target: factors}, magnitudes={target: torch.arange(4.0).reshape(4, 1, 1, 1)})
    tensors, metadata = diffusers.render(adapter)
    assert tensors[f"{target}.lora_magnitude_vector.weight"].shape == (1, 4, 1, 1)
    assert torch.equal(diffusers.parse(tensors, metadata).magnitudes[target], adapter.magnitudes[target])


@pytest.mark.parametrize("norms", [torch.ones(3), torch.ones(2, 2), torch.ones(())])
def test_a_magnitude_of_another_size_is_refused(norms: Tensor) -> None:
    key = f"{TO_Q}.lora_magnitude_vector"
    assert refused({**file_of(f"{TO_Q}.lora_A.weight"), key: norms}).where == key


def test_magnitudes_are_for_all_layers_of_a_model_or_none() -> None:
    tensors = file_of(f"{TO_Q}.lora_A.weight") | file_of(f"{TO_OUT}.lora_A.weight")
    tensors |= {f"{TO_Q}.lora_magnitude_vector": torch.ones(4)}
    assert refused(tensors).where == f"{TO_OUT}.lora_A.weight"


FACTORS = LoraFactors(DOWN, UP, 0.3)


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter({TO_Q: FACTORS, TO_OUT: FACTORS}, magnitudes={TO_Q: torch.ones(4, 1)}),
        Adapter({TO_Q: FACTORS}, magnitudes={TO_Q: torch.ones(1, 3)}),
        Adapter({TO_Q: FACTORS}, magnitudes={TO_Q: torch.ones(())}),
        Adapter({TO_Q: FACTORS}, foreign={"lora_unet_x.diff": DOWN}),
        Adapter({TO_Q: FACTORS}, foreign={f"{TO_OUT}.lora_A.weight": DOWN}),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(adapter: Adapter) -> None:
    with pytest.raises(CorruptError) as caught:
        diffusers.render(adapter)
    assert caught.value.fix


def test_unknown_tensors_of_a_model_and_unknown_metadata_are_carried_along() -> None:
    tensors = {**file_of(f"{TO_Q}.lora_A.weight"), "unet.conv_in.bias_lora": DOWN}
    adapter = diffusers.parse(tensors, {"ss_network_dim": "4", "format": "pt"})
    assert set(adapter.foreign) == {"unet.conv_in.bias_lora"}
    assert adapter.provenance == {"source_metadata": {"ss_network_dim": "4"}}
    kept, metadata = diffusers.render(native.parse(*native.render(adapter)))
    assert torch.equal(kept["unet.conv_in.bias_lora"], DOWN)
    assert metadata["ss_network_dim"] == "4"
    assert diffusers.parse(kept, metadata).provenance == adapter.provenance


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"source_metadata": {}},
        {
            "source_metadata": {"a": "b", "format": "np", "lora_adapter_metadata": "{", "lora_pipeline": "[]"},
            "base": "b",
        },
        {"source_metadata": {"a": 1, "b": "2"}},
        {"source_metadata": "text"},
        {"source_metadata": None, "parents": [{"weight": 0.5}]},
    ],
)
def test_any_provenance_comes_back(provenance: dict[str, Any]) -> None:
    adapter = Adapter({TO_Q: FACTORS}, provenance=provenance)
    assert diffusers.parse(*diffusers.render(adapter)).provenance == provenance


def test_tokens_of_both_of_sdxls_encoders_are_kept_apart() -> None:
    adapter = Adapter({}, {"<a>": torch.ones(1, 2)}, embeddings_2={"<a>": torch.ones(1, 3), "2.<b>": torch.ones(2, 3)})
    tensors, metadata = diffusers.render(adapter)
    assert set(tensors) == {
        "lora_pipeline.embedding.<a>", "lora_pipeline.embedding_2.<a>", "lora_pipeline.embedding_2.2.<b>",
    }  # fmt: skip
    again = diffusers.parse(tensors, metadata)
    assert {token: rows.shape for token, rows in again.embeddings_2.items()} == {"<a>": (1, 3), "2.<b>": (2, 3)}
    assert again.embeddings["<a>"].shape == (1, 2)


def test_a_dora_comes_back_through_native() -> None:
    adapter = Adapter({TO_Q: FACTORS}, magnitudes={TO_Q: torch.rand(4, 1)})
    again = diffusers.parse(*diffusers.render(native.parse(*native.render(adapter))))
    assert torch.equal(again.magnitudes[TO_Q], adapter.magnitudes[TO_Q])
    assert again.factors[TO_Q].alpha == 0.3
    assert replace(again, magnitudes={}).magnitudes == {}
