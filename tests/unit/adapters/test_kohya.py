"""Kohya's format: real layer names and shapes, files as its scripts write them, and files that are wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d

from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter, check_understood
from lora_pipeline.adapters.formats import save
from lora_pipeline.adapters.formats.kohya import parse, render
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.storage import write_tensors
from lora_pipeline.adapters.topology import FAMILIES, layers
from lora_pipeline.errors import CorruptError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
CONV = "lora_unet_mid_block_resnets_0_conv1"
TRAINED = {"ss_learning_rate": "0.0001", "sshs_model_hash": "00ff", "modelspec.title": "ü", "name": "free text"}


def factors_for(shape: tuple[int, ...], rank: int, alpha: float, dtype: torch.dtype = torch.float32) -> LoraFactors:
    source = torch.Generator().manual_seed(sum(shape) + rank)
    down = torch.randn(rank, *shape[1:], generator=source).to(dtype)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=source).to(dtype)
    return LoraFactors(down, up, alpha)


def module(name: str, shape: tuple[int, ...], rank: int, alpha: float | None) -> dict[str, Tensor]:
    """A module's tensors as kohya's trainer saves them in float16."""
    factors = factors_for(shape, rank, 1.0, torch.float16)
    tensors = {f"{name}.lora_down.weight": factors.down, f"{name}.lora_up.weight": factors.up}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha, dtype=torch.float16)}


SD1 = {
    **module(TO_Q, (320, 320), 4, 2.0),
    **module(TO_K, (320, 768), 8, 8.0),
    **module(FC1, (3072, 768), 3, 1.0),
    **module(CONV, (1280, 1280, 3, 3), 1, 0.5),
}
SDXL = {
    **module("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", (640, 2048), 4, 2.0),
    **module("lora_unet_output_blocks_2_2_conv", (1280, 1280, 3, 3), 1, 1.0),
    **module("lora_unet_middle_block_2_emb_layers_1", (1280, 1280), 2, 2.0),
    **module("lora_unet_label_emb_0_0", (1280, 2816), 2, 2.0),
    **module("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", (768, 768), 2, 1.0),
    **module("lora_te2_text_model_encoder_layers_31_mlp_fc2", (1280, 5120), 2, 1.0),
    "bundle_emb.<a>.clip_l": torch.ones(2, 768),
    "bundle_emb.<a>.clip_g": torch.ones(2, 1280),
}
SD1_FACTS = {
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "ss_base_model_version": "sd_v1",
    "ss_network_alpha": "Dynamic",
    "ss_network_dim": "Dynamic",
    "ss_network_module": "networks.lora",
    "ss_v2": "False",
}
SDXL_FACTS = SD1_FACTS | {
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "ss_base_model_version": "sdxl_base_v1-0",
}


def assert_same_tensors(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def assert_same(one: Adapter, other: Adapter) -> None:
    for side in ("down", "up"):
        assert_same_tensors(
            *[{key: getattr(each, side) for key, each in one_of.factors.items()} for one_of in (one, other)]
        )
    assert {key: each.alpha for key, each in one.factors.items()} == {
        key: each.alpha for key, each in other.factors.items()
    }
    for field in ("embeddings", "embeddings_2", "foreign", "magnitudes"):
        assert_same_tensors(getattr(one, field), getattr(other, field))
    assert one.provenance == other.provenance


@pytest.mark.parametrize(("tensors", "facts"), [(SD1, SD1_FACTS), (SDXL, SDXL_FACTS)], ids=["sd1", "sdxl"])
def test_a_trainers_file_is_written_back_byte_for_byte(
    tmp_path: Path, tensors: dict[str, Tensor], facts: dict[str, str]
) -> None:
    write_tensors(tmp_path / "x", tensors, facts | TRAINED)
    adapter = load_adapter(tmp_path / "x")
    assert adapter.provenance == {"source_metadata": facts | TRAINED}
    assert len({each.rank for each in adapter.factors.values()}) > 1
    save(adapter, tmp_path / "y", "kohya")
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_diffusers_names_in_a_file_for_sdxl_are_read_and_become_sgms() -> None:
    shape = layers("sdxl")["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"]
    tensors, _ = render(
        parse(module("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k", shape, 2, 1.0), {})
    )
    assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.alpha" in tensors


def test_sgms_names_in_a_file_for_sd1_are_read_and_become_diffusers() -> None:
    tensors, _ = render(
        parse(module("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", (320, 768), 2, 1.0), {})
    )
    assert f"{TO_K}.alpha" in tensors


@pytest.mark.parametrize(
    "said", [{"ss_base_model_version": "sdxl_base_v0-9"}, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}]
)
def test_what_a_file_says_decides_where_its_layers_do_not(said: dict[str, str]) -> None:
    ours = module("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", (768, 768), 2, 1.0)
    assert render(parse(ours, said))[0].keys() == ours.keys()
    other = {name.replace("te1", "te"): tensor for name, tensor in ours.items()}
    assert render(parse(ours, {}))[0].keys() == other.keys()
    sd1 = {name.replace("te1", "te"): tensor for name, tensor in ours.items()} | module(TO_K, (320, 768), 2, 1.0)
    assert render(parse(sd1, said))[0].keys() == sd1.keys()


NUMBERS = st.floats(-1e3, 1e3) | st.integers(-8, 64).map(float)
ROWS = st.dictionaries(
    st.text("ab.<>_é", min_size=1), st.integers(1, 3).map(lambda count: torch.ones(count, 4)), max_size=2
)
SAYINGS = st.sampled_from(["ss_network_dim", "ss_v2", "ss_epoch", "modelspec.architecture", "x"])
SOURCES = st.dictionaries(SAYINGS, st.text(max_size=3)).map(lambda said: {"source_metadata": said} if said else {})


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    table = layers(draw(st.sampled_from(FAMILIES)))
    chosen = draw(st.lists(st.sampled_from(sorted(table)), max_size=5, unique=True))
    factors = {
        target: factors_for(table[target], draw(st.integers(1, 3)), draw(NUMBERS), draw(st.sampled_from(DTYPES)))
        for target in chosen
    }
    provenance: dict[str, Any] = draw(st.sampled_from([{}, {"base": "b", "parents": [1]}])) | draw(SOURCES)
    foreign = {"lora_unet_x.diff": torch.ones(1)} if draw(st.booleans()) and factors else {}
    return Adapter(factors, draw(ROWS), provenance, foreign, draw(ROWS))


@given(adapters())
def test_any_adapter_comes_back_whole(adapter: Adapter) -> None:
    tensors, metadata = render(adapter)
    again = parse(tensors, metadata)
    assert_same(again, adapter)
    tensors_again, metadata_again = render(again)
    assert_same_tensors(tensors_again, tensors)
    assert metadata_again == metadata


@pytest.mark.parametrize("form", ["native", "kohya"])
def test_nothing_is_lost_on_the_way_through_another_format(tmp_path: Path, form: str) -> None:
    write_tensors(tmp_path / "x", SDXL | {"lora_unet_x.diff": torch.ones(3)}, SDXL_FACTS | TRAINED)
    adapter = load_adapter(tmp_path / "x")
    save(adapter, tmp_path / "y", form)
    assert_same(load_adapter(tmp_path / "y"), adapter)
    save(load_adapter(tmp_path / "y"), tmp_path / "z", "kohya")
    assert (tmp_path / "z").read_bytes() == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize(
    ("alpha", "factors", "expected"),
    [
        (16.0, torch.float16, torch.float16),
        (16.0, torch.bfloat16, torch.bfloat16),
        (257.0, torch.bfloat16, torch.float32),
        (1e5, torch.float16, torch.float32),
        (0.1, torch.float16, torch.float64),
        (0.1, torch.float64, torch.float64),
    ],
)
def test_alpha_has_the_factors_dtype_unless_that_would_round_it(
    alpha: float, factors: torch.dtype, expected: torch.dtype
) -> None:
    adapter = Adapter({"unet.conv_out": factors_for((4, 320, 3, 3), 2, alpha, factors)})
    tensor = render(adapter)[0]["lora_unet_conv_out.alpha"]
    assert tensor.dtype == expected
    assert tensor.ndim == 0
    assert tensor.item() == alpha


def test_without_alpha_it_is_the_rank() -> None:
    (factors,) = parse(module(TO_Q, (320, 320), 4, None), {}).factors.values()
    assert factors.alpha == 4.0


def test_alpha_may_be_a_vector_of_one() -> None:
    tensors = module(TO_Q, (320, 320), 4, 2.0)
    tensors[f"{TO_Q}.alpha"] = torch.tensor([2])
    assert parse(tensors, {}).factors.popitem()[1].alpha == 2.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(320, 1), (1, 320)], ids=["rows", "columns"])
def test_a_dora_is_written_back(shape: tuple[int, int]) -> None:
    tensors = SD1 | {f"{TO_Q}.dora_scale": torch.arange(320.0).reshape(shape)}
    adapter = parse(tensors, {})
    assert len(adapter.magnitudes) == 1
    assert_same_tensors(render(adapter)[0], tensors)


def test_a_module_of_another_kind_is_written_as_a_lora() -> None:
    source = torch.Generator().manual_seed(0)
    halves = {
        f"w{index}_{side}": torch.randn(*shape, generator=source)
        for index in (1, 2)
        for side, shape in (("a", (6, 2)), ("b", (2, 5)))
    }
    tensors = {f"{TO_Q}.hada_{name}": each for name, each in halves.items()} | {f"{TO_Q}.alpha": torch.tensor(1.0)}
    expected = (halves["w1_a"] @ halves["w1_b"]) * (halves["w2_a"] @ halves["w2_b"]) / 2
    (factors,) = parse(*render(parse(tensors, {}))).factors.values()
    torch.testing.assert_close(factors.delta(), expected)


@pytest.mark.parametrize("flat", [True, False])
def test_a_middle_factor_is_folded_in_exactly(flat: bool) -> None:
    source = torch.Generator().manual_seed(0)
    down = torch.randn(2, 5, 1, 1, generator=source)
    mid = torch.randn(2, 2, 3, 3, generator=source)
    up = torch.randn(7, 2, 1, 1, generator=source)
    squeezed = (down.flatten(1), up.flatten(1)) if flat else (down, up)
    tensors = {f"{CONV}.lora_{name}.weight": each for name, each in zip(("down", "up"), squeezed, strict=True)}
    tensors |= {f"{CONV}.lora_mid.weight": mid, f"{CONV}.alpha": torch.tensor(3.0)}
    (factors,) = parse(tensors, {}).factors.values()
    picture = torch.randn(1, 5, 8, 8, generator=source)
    one_by_one = conv2d(conv2d(conv2d(picture, down), mid), up) * 3 / 2
    torch.testing.assert_close(conv2d(picture, factors.delta()), one_by_one, rtol=1e-5, atol=1e-5)


def test_bundled_embeddings_of_both_kinds_are_read() -> None:
    rows = torch.ones(2, 768)
    tensors = {"bundle_emb.<a>.string_to_param.*": rows, "bundle_emb.b.c.emb_params": rows[0]}
    adapter = parse(tensors, {})
    assert adapter.embeddings.keys() == {"<a>", "b.c"}
    assert adapter.embeddings["b.c"].shape == (1, 768)
    assert render(adapter)[0].keys() == {"bundle_emb.<a>.emb_params", "bundle_emb.b.c.emb_params"}


def test_a_second_encoders_rows_lie_beside_the_firsts() -> None:
    adapter = Adapter({}, {"<a>": torch.ones(1, 768)}, embeddings_2={"<a>": torch.zeros(1, 1280)})
    tensors, metadata = render(adapter)
    assert tensors.keys() == {"bundle_emb.<a>.clip_l", "bundle_emb.<a>.clip_g"}
    assert_same(parse(tensors, metadata), adapter)


def automatic1111(metadata: Mapping[str, str]) -> str:
    """How AUTOMATIC1111 tells a file's base."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    return "sd2" if metadata.get("ss_v2") == "True" else "sd1" if metadata else "unknown"


@pytest.mark.parametrize("name", FAMILIES)
def test_user_interfaces_can_tell_the_base(name: str) -> None:
    table = layers(name)
    target = next(target for target in sorted(table) if "attn2.to_k" in target)
    _, metadata = render(Adapter({target: factors_for(table[target], 4, 2.0)}))
    assert automatic1111(metadata) == name
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")


def test_the_source_has_the_last_word_and_what_it_lacks_is_added() -> None:
    source = {"ss_network_dim": "32", "ss_network_module": "lycoris.kohya"}
    tensors, metadata = render(parse(SD1, source))
    assert metadata == SD1_FACTS | source | {"lora_pipeline": metadata["lora_pipeline"]}
    assert parse(tensors, metadata).provenance == {"source_metadata": source}


def test_what_other_programs_add_to_our_file_is_kept() -> None:
    tensors, metadata = render(replace(parse(SD1, {}), provenance={"base": "b"}))
    again = parse(tensors, metadata | {"ss_training_comment": "resized", "ss_network_dim": "4"})
    expected = {"ss_training_comment": "resized", "ss_network_dim": "4"}
    assert again.provenance == {"base": "b", "source_metadata": expected}


@pytest.mark.parametrize(
    ("extra", "carried"),
    [
        ({"lora_unet_controlnet_0.lora_up.weight": torch.ones(2)}, True),
        ({f"{TO_Q}.scale_of_something": torch.ones(2)}, True),
        ({"bundle_emb.<a>.string_to_token.*": torch.tensor(265)}, True),
        ({"optimizer": torch.ones(2)}, False),
    ],
)
def test_what_is_not_understood_is_carried_along(extra: dict[str, Tensor], carried: bool) -> None:
    adapter = parse(SD1 | extra, {})
    assert adapter.foreign.keys() == extra.keys()
    assert len(adapter.factors) == 4
    with pytest.raises(CorruptError, match="unknown kind"):
        check_understood("x", adapter)
    if carried:
        assert_same_tensors(render(adapter)[0], SD1 | extra)
    else:
        with pytest.raises(CorruptError, match="another format"):
            render(adapter)


def test_what_is_not_understood_stays_with_its_module() -> None:
    sgm = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    tensors = module(sgm, (320, 768), 2, 1.0) | {f"{sgm}.diff_b": torch.ones(320)}
    adapter = parse(tensors, {})
    assert adapter.foreign.keys() == {f"{sgm}.diff_b"}
    assert parse(*render(adapter)).foreign.keys() == {f"{TO_K}.diff_b"}


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """A module with other tensors, by suffix with `__` for the dot."""
    tensors: dict[str, Tensor | None] = {**module(TO_Q, (320, 320), 4, 2.0)}
    tensors |= {f"{TO_Q}.{suffix.replace('__', '.')}": tensor for suffix, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    "tensors",
    [
        changed(lora_up__weight=None),
        changed(lora_down__weight=None),
        changed(lora_up__weight=torch.ones(320, 3)),
        changed(lora_up__weight=torch.ones(320, 4, 3, 3)),
        changed(lora_down__weight=torch.tensor(1.0)),
        changed(alpha=torch.ones(2)),
        changed(alpha=torch.ones(0)),
        changed(lora_mid__weight=torch.ones(4, 3, 3, 3)),
        changed(lora_mid__weight=torch.ones(4)),
        changed(lora_mid__weight=torch.ones(4, 4, 3, 3), lora_up__weight=torch.ones(320, 4, 3, 3)),
        changed(lora_mid__weight=torch.ones(4, 4, 3, 3), lora_down__weight=torch.ones(4, 5, 3, 3)),
        changed(lora_mid__weight=torch.ones(1).expand(4, 4, 400, 400)),
    ],
)
def test_a_broken_module_is_refused_by_its_name(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CorruptError) as caught:
        parse(tensors, {})
    assert caught.value.where == TO_Q


def test_two_names_of_one_layer_are_refused() -> None:
    other = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    with pytest.raises(CorruptError, match="second name"):
        parse(SD1 | module(other, (320, 320), 4, 2.0), {})
    with pytest.raises(CorruptError, match="second name"):
        parse(SD1 | {f"{other}.dora_scale": torch.ones(320, 1)}, {})
    with pytest.raises(CorruptError, match="second embedding"):
        parse({"bundle_emb.a.clip_l": torch.ones(1, 4), "bundle_emb.a.emb_params": torch.ones(1, 4)}, {})


def test_a_file_of_mostly_unknown_modules_is_refused_with_some_names() -> None:
    flux = {f"lora_unet_double_blocks_{index}_img_attn_proj.alpha": torch.ones(()) for index in range(5)}
    with pytest.raises(CorruptError, match=r"5 of 9 modules.*double_blocks_0.*double_blocks_2"):
        parse(SD1 | flux, {})


@pytest.mark.parametrize("text", ["{", "[]", '{"source_metadata": "ss_v2"}', '{"a": NaN}', '{"a": 1e999}'])
def test_a_broken_provenance_is_refused(text: str) -> None:
    with pytest.raises(CorruptError) as caught:
        parse(SD1, {"lora_pipeline": text})
    assert caught.value.where == "lora_pipeline"


@pytest.mark.parametrize("source", [1, {"a": 1}])
def test_source_metadata_that_is_no_text_is_refused(source: Any) -> None:
    with pytest.raises(CorruptError, match="text"):
        render(Adapter({}, provenance={"source_metadata": source}))


def test_a_layer_without_a_name_is_refused() -> None:
    with pytest.raises(CorruptError, match="no name") as caught:
        render(Adapter({"unet.my_block.0": factors_for((4, 4), 1, 1.0)}))
    assert caught.value.where == "unet.my_block.0"


def test_provenance_is_sorted_json() -> None:
    _, metadata = render(Adapter({}, {"<a>": torch.ones(1, 4)}, {"b": 1, "a": [None]}))
    assert metadata == {"lora_pipeline": json.dumps({"a": [None], "b": 1})}
