"""Blocks, against tables written out by hand from the CompVis UNet and the programs that use its names."""

from __future__ import annotations

import pytest

from lora_pipeline.adapters.blocks import BLOCKS, REST, VECTORS, block_factors, block_of
from lora_pipeline.errors import ParamsError

# CompVis' input_blocks and output_blocks of SD 1 and 2, as diffusers names what stands in them.
SD1 = {
    "conv_in": "IN00",
    "down_blocks.0.resnets.0.conv1": "IN01",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "IN01",
    "down_blocks.0.attentions.1.proj_in": "IN02",
    "down_blocks.0.downsamplers.0.conv": "IN03",
    "down_blocks.1.resnets.0.conv_shortcut": "IN04",
    "down_blocks.1.attentions.1.proj_out": "IN05",
    "down_blocks.1.downsamplers.0.conv": "IN06",
    "down_blocks.2.attentions.0.proj_in": "IN07",
    "down_blocks.2.attentions.1.proj_in": "IN08",
    "down_blocks.2.downsamplers.0.conv": "IN09",
    "down_blocks.3.resnets.0.time_emb_proj": "IN10",
    "down_blocks.3.resnets.1.conv2": "IN11",
    "mid_block.resnets.1.conv1": "M00",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "M00",
    "up_blocks.0.resnets.0.conv1": "OUT00",
    "up_blocks.0.resnets.1.conv1": "OUT01",
    "up_blocks.0.resnets.2.conv1": "OUT02",
    "up_blocks.0.upsamplers.0.conv": "OUT02",
    "up_blocks.1.attentions.0.proj_in": "OUT03",
    "up_blocks.1.attentions.1.proj_in": "OUT04",
    "up_blocks.1.attentions.2.proj_in": "OUT05",
    "up_blocks.1.upsamplers.0.conv": "OUT05",
    "up_blocks.2.attentions.0.proj_in": "OUT06",
    "up_blocks.2.attentions.1.proj_in": "OUT07",
    "up_blocks.2.upsamplers.0.conv": "OUT08",
    "up_blocks.3.attentions.0.proj_in": "OUT09",
    "up_blocks.3.attentions.1.proj_in": "OUT10",
    "up_blocks.3.attentions.2.proj_in": "OUT11",
    "time_embedding.linear_1": "REST",
    "add_embedding.linear_2": "REST",
    "conv_out": "REST",
}
SDXL_ATTENTIONS = {
    "down_blocks.1.attentions.0.proj_in": "IN04",
    "down_blocks.1.attentions.1.proj_in": "IN05",
    "down_blocks.2.attentions.0.proj_in": "IN07",
    "down_blocks.2.attentions.1.proj_in": "IN08",
    "mid_block.attentions.0.proj_in": "M00",
    "up_blocks.0.attentions.0.proj_in": "OUT00",
    "up_blocks.0.attentions.1.proj_in": "OUT01",
    "up_blocks.0.attentions.2.proj_in": "OUT02",
    "up_blocks.1.attentions.0.proj_in": "OUT03",
    "up_blocks.1.attentions.1.proj_in": "OUT04",
    "up_blocks.1.attentions.2.proj_in": "OUT05",
}
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
IN04, IN05 = "unet.down_blocks.1.attentions.0.proj_in", "unet.down_blocks.1.attentions.1.proj_in"


@pytest.mark.parametrize(("path", "block"), [*SD1.items(), *SDXL_ATTENTIONS.items()])
def test_a_layer_of_the_unet_is_in_the_block_of_the_table(path: str, block: str) -> None:
    assert block_of(f"unet.{path}") == block


@pytest.mark.parametrize("target", [TEXT, TEXT.replace("text_encoder", "text_encoder_2")])
def test_text_encoders_are_the_base(target: str) -> None:
    assert block_of(target) == "BASE"


def test_every_layer_is_in_a_block_that_can_be_named() -> None:
    assert set(SD1.values()) | {"BASE"} == set(BLOCKS)


@pytest.mark.parametrize(
    ("length", "names"),
    [
        (12, ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT0{i}" for i in range(6))]),
        (17, ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(3, 12))]),
        (20, ["BASE", *(f"IN0{i}" for i in range(9)), "M00", *(f"OUT0{i}" for i in range(9))]),
        (26, ["BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]),
    ],
)
def test_a_vector_names_the_blocks_that_other_programs_read_in_it(length: int, names: list[str]) -> None:
    assert list(VECTORS[length]) == names
    assert len(names) == length


def test_a_vector_of_12_covers_the_attentions_of_sdxl_and_one_of_17_those_of_sd1() -> None:
    sd1 = {block for path, block in SD1.items() if "attentions" in path}
    assert sd1 <= set(VECTORS[17])
    assert set(SDXL_ATTENTIONS.values()) | {"BASE"} == set(VECTORS[12])


def test_a_vector_gives_each_layer_the_number_of_its_block() -> None:
    vector = [float(place) for place in range(26)]
    factors = block_factors("x", vector, [f"unet.{path}" for path in SD1] + [TEXT])
    assert factors[TEXT] == 0
    assert factors["unet.conv_in"] == 1
    assert factors["unet.mid_block.resnets.1.conv1"] == 13
    assert factors["unet.up_blocks.3.attentions.2.proj_in"] == 25
    assert factors["unet.conv_out"] == 1.0, "no program has a number for it"


def test_names_and_globs_that_meet_multiply_and_the_rest_stays_whole() -> None:
    mid = "unet.mid_block.attentions.0.proj_in"
    factors = block_factors("x", {"IN04": 0.5, "*attentions.0.*": -3.0, "MID": 2.0}, [IN04, IN05, mid, TEXT])
    assert factors == {IN04: -1.5, IN05: 1.0, mid: -6.0, TEXT: 1.0}


def test_a_layer_may_be_named_in_full_and_outside_the_blocks_by_rest() -> None:
    factors = block_factors("x", {IN05: 0.25, REST: 0.0}, [IN04, IN05, "unet.conv_out"])
    assert factors == {IN04: 1.0, IN05: 0.25, "unet.conv_out": 0.0}


def test_a_block_without_layers_may_be_named() -> None:
    assert block_factors("x", {"OUT11": 0.0}, [IN04]) == {IN04: 1.0}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0] * 16, "16 numbers"),
        ([], "0 numbers"),
        ({"IN4": 1.0}, "'IN4', which is no block"),
        ({"base": 1.0}, "'base', which is no block"),
        ({"IN12": 1.0}, "'IN12', which is no block"),
        ({"*attn3*": 1.0}, "matches no layer"),
        ({"unet.conv_in": 1.0}, "matches no layer"),
    ],
)
def test_what_names_nothing_is_refused(weights: dict[str, float] | list[float], said: str) -> None:
    with pytest.raises(ParamsError, match=said) as caught:
        block_factors("block_weights.zorp", weights, [IN04, TEXT])
    assert caught.value.where == "block_weights.zorp"


def test_a_misspelt_block_is_told_the_nearest() -> None:
    with pytest.raises(ParamsError) as caught:
        block_factors("x", {"IN4": 1.0}, [IN04])
    assert caught.value.fix == "write IN04"


@pytest.mark.parametrize(
    ("length", "path"),
    [(17, "down_blocks.0.downsamplers.0.conv"), (12, "conv_in"), (20, "up_blocks.3.resnets.0.conv1")],
)
def test_a_vector_that_says_nothing_of_a_changed_block_is_refused(length: int, path: str) -> None:
    """A1111 leaves such layers out, kohya's scripts leave them whole."""
    with pytest.raises(ParamsError, match="says nothing of"):
        block_factors("x", [1.0] * length, [f"unet.{path}"])
