"""Names in kohya's format: each means one layer, each layer has one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import pytest

from lora_pipeline.adapters.kohya_names import (
    TEXT_WORDS,
    UNET_WORDS,
    key_of_token,
    module_of_target,
    target_of_module,
    token_of_key,
)
from lora_pipeline.adapters.topology import FAMILIES, families, family, layers

BLOCK = "transformer_blocks.0.attn1"


@pytest.mark.parametrize("sgm", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_has_a_name_of_its_own_and_is_found_by_it(name: str, sgm: bool) -> None:
    modules = {target: module_of_target(target, sgm=sgm, two_encoders="sdxl" in name) or "" for target in layers(name)}
    assert len(set(modules.values())) == len(modules)
    assert {target: target_of_module(module) for target, module in modules.items()} == {
        target: target for target in modules
    }


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", f"unet.down_blocks.1.attentions.0.{BLOCK}.to_q"),
        ("lora_unet_middle_block_1_proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_out_layers_3", "unet.mid_block.resnets.1.conv2"),
        ("lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_0_proj",
         "unet.up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj"),
        ("lora_unet_output_blocks_2_2_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_2_1_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_input_blocks_7_0_skip_connection", "unet.down_blocks.2.resnets.0.conv_shortcut"),
        ("lora_unet_input_blocks_1_0_emb_layers_1", "unet.down_blocks.0.resnets.0.time_emb_proj"),
        ("lora_unet_input_blocks_0_0", "unet.conv_in"),
        ("lora_unet_label_emb_0_2", "unet.add_embedding.linear_2"),
        ("lora_unet_time_embed_0", "unet.time_embedding.linear_1"),
        ("lora_unet_out_2", "unet.conv_out"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
         f"unet.down_blocks.0.attentions.0.{BLOCK}.to_out.0"),
        ("lora_unet_up_blocks_3_resnets_2_conv_shortcut", "unet.up_blocks.3.resnets.2.conv_shortcut"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text_encoder.text_model.encoder.layers.11.mlp.fc1"),
        ("lora_te1_encoder_layers_0_self_attn_q_proj", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
        ("lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
         "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj"),
        ("lora_te2_text_projection", "text_encoder_2.text_model.text_projection"),
    ],
)  # fmt: skip
def test_published_names_mean_what_they_mean(module: str, target: str) -> None:
    assert target_of_module(module) == target


@pytest.mark.parametrize(
    "module",
    [
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_unet_input_blocks_3_1_proj_in",
        "lora_unet_down_blocks_00_conv1",
        "lora_unet_conv1_",
        "lora_unet_",
        "lora_te_conv_in",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "down_blocks_0_conv1",
    ],
)
def test_other_names_mean_nothing(module: str) -> None:
    assert target_of_module(module) is None


def test_layers_without_a_name_are_told() -> None:
    assert module_of_target("unet.controlnet_blocks.0", sgm=False, two_encoders=False) is None


@pytest.mark.parametrize("words", [UNET_WORDS, TEXT_WORDS])
def test_no_two_rows_of_words_are_spelled_alike(words: Iterable[str]) -> None:
    """Sardinas and Patterson 1953: no dangling suffix is itself a word."""
    code = {f"{word}_" for word in words} | {f"{digit}_" for digit in range(10)}
    pending = {one.removeprefix(other) for one in code for other in code if one != other and one.startswith(other)}
    seen: set[str] = set()
    while pending:
        suffix = pending.pop()
        assert suffix not in code
        seen.add(suffix)
        longer = {one.removeprefix(suffix) for one in code if one.startswith(suffix)}
        longer |= {suffix.removeprefix(one) for one in code if suffix.startswith(one)}
        pending |= longer - seen


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("two_encoders", [True, False])
@pytest.mark.parametrize("token", ["<a>", "b.c", "x.clip_l", "ü"])
def test_a_token_is_found_by_its_key(token: str, second: bool, two_encoders: bool) -> None:
    assert token_of_key(key_of_token(token, second=second, two_encoders=two_encoders)) == (token, second)


@pytest.mark.parametrize(
    ("key", "token"),
    [
        ("bundle_emb.a.string_to_param.*", ("a", False)),
        ("bundle_emb.a.string_to_token.*", None),
        ("a.emb_params", None),
        ("emb_params", None),
    ],
)
def test_only_bundled_rows_have_a_token(key: str, token: tuple[str, bool] | None) -> None:
    assert token_of_key(key) == token


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_told_by_all_its_layers(name: str) -> None:
    assert family(layers(name)) == name


@pytest.mark.parametrize(
    ("target", "shape", "expected"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (320, 768), ("sd1",)),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (320, 1024), ("sd2",)),
        ("unet.down_blocks.0.attentions.0.proj_in", (320, 320), ("sd1", "sd2")),
        ("unet.down_blocks.0.attentions.0.proj_in", (320, 320, 1, 1), ("sd1", "sd2")),
        ("unet.down_blocks.0.resnets.0.conv1", (320, 320, 3, 3), ("sd1", "sd2", "sdxl")),
        ("unet.down_blocks.0.resnets.0.conv1", (320, 320), ()),
        ("unet.conv_in", (320, 9, 3, 3), ("sd1", "sd2", "sdxl")),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", (768, 768), ("sd1", "sdxl")),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", (1280, 1280), ("sdxl",)),
        ("unet.down_blocks.9.resnets.0.conv1", (320, 320, 3, 3), ()),
    ],
)
def test_a_layer_belongs_to_the_families_that_have_it(
    target: str, shape: tuple[int, ...], expected: tuple[str, ...]
) -> None:
    assert families({target: shape}) == expected
    assert family({target: shape}) == (expected[0] if len(expected) == 1 else None)


def test_no_layers_are_of_no_family() -> None:
    assert families({}) == ()


def test_names_need_no_torch() -> None:
    code = "import sys, lora_pipeline.adapters.kohya_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
