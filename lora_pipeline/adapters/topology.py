"""The layers of the Stable Diffusion families, frozen: every linear layer and convolution, and its weight's shape.

Needs no torch and no model.

    sd1    SD 1.x: CLIP ViT-L/14, projections around attention are 1 x 1 convolutions
    sd2    SD 2.x: OpenCLIP ViT-H/14 without its last layer
    sdxl   SDXL: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14, three resolutions, deep transformers, size conditioning

Source: the published configurations of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 and
stabilityai/stable-diffusion-xl-base-1.0, in diffusers' and transformers' spelling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2, UNET, target_of

SD1, SD2, SDXL = "sd1", "sd2", "sdxl"

Shape = tuple[int, ...]
Layers = Iterator[tuple[str, Shape]]


@dataclass(frozen=True)
class _UNet:
    channels: tuple[int, ...]  # by resolution, finest first
    depths: tuple[int, ...]  # transformer blocks of each attention, by resolution; 0 is none
    cross: int  # width of the text encoder's output
    linear: bool  # whether proj_in and proj_out are linear layers
    added: int = 0  # width of the size and pooled text conditioning


@dataclass(frozen=True)
class _Text:
    layers: int
    width: int
    projection: bool = False


@dataclass(frozen=True)
class _Family:
    unet: _UNet
    text: Mapping[str, _Text]


_FAMILIES = {
    SD1: _Family(
        _UNet((320, 640, 1280, 1280), (1, 1, 1, 0), cross=768, linear=False),
        {TEXT_ENCODER: _Text(12, 768)},
    ),
    SD2: _Family(
        _UNet((320, 640, 1280, 1280), (1, 1, 1, 0), cross=1024, linear=True),
        {TEXT_ENCODER: _Text(23, 1024)},
    ),
    SDXL: _Family(
        _UNet((320, 640, 1280), (0, 2, 10), cross=2048, linear=True, added=2816),
        {TEXT_ENCODER: _Text(12, 768), TEXT_ENCODER_2: _Text(32, 1280, projection=True)},
    ),
}
FAMILIES = tuple(_FAMILIES)
_RESNETS = 2  # in each down block; an up block has one more
# Inpainting, depth and edit variants are the same network behind a wider first layer.
_VARIABLE = "unet.conv_in"


@cache
def layers(name: str) -> Mapping[str, Shape]:
    """All layers of a family.

    Args:
        name: One of `FAMILIES`.

    Returns:
        The shape of the weight by target: (out, in) or (out, in, height, width).
    """
    model = _FAMILIES[name]
    found = {target_of(UNET, path): shape for path, shape in _unet(model.unet)}
    for encoder, config in model.text.items():
        found |= {target_of(encoder, path): shape for path, shape in _text(config)}
    return MappingProxyType(found)


def family(changes: Mapping[str, Shape]) -> str | None:
    """The one family that an adapter can be for.

    Args:
        changes: The shape of the change by target. 1 x 1 convolutions and linear layers count as the same.

    Returns:
        One of `FAMILIES`; None where no family has all these layers, or several do (SD 1.x and SDXL share their first
        text encoder and many convolutions).
    """
    fitting = families(changes)
    return fitting[0] if len(fitting) == 1 else None


def families(changes: Mapping[str, Shape]) -> tuple[str, ...]:
    """All families that have these layers, for whom the rest of a file decides; see `family`."""
    return tuple(name for name in FAMILIES if changes and _has(layers(name), changes))


def _has(known: Mapping[str, Shape], changes: Mapping[str, Shape]) -> bool:
    return all(
        target in known and (target == _VARIABLE or _bare(known[target]) == _bare(shape))
        for target, shape in changes.items()
    )


def _bare(shape: Shape) -> Shape:
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _unet(config: _UNet) -> Layers:
    first, last = config.channels[0], config.channels[-1]
    time = 4 * first
    yield "conv_in", (first, 4, 3, 3)
    yield from _embedding("time_embedding", first, time)
    if config.added:
        yield from _embedding("add_embedding", config.added, time)
    yield from _down_blocks(config, time)
    for index in range(2):
        yield from _resnet(f"mid_block.resnets.{index}", last, last, time)
    yield from _attention("mid_block.attentions.0", last, max(config.depths[-1], 1), config)
    yield from _up_blocks(config, time)
    yield "conv_out", (4, first, 3, 3)


def _down_blocks(config: _UNet, time: int) -> Layers:
    before = config.channels[0]
    for level, (channels, depth) in enumerate(zip(config.channels, config.depths, strict=True)):
        block = f"down_blocks.{level}"
        for index in range(_RESNETS):
            yield from _resnet(f"{block}.resnets.{index}", before, channels, time)
            yield from _attention(f"{block}.attentions.{index}", channels, depth, config)
            before = channels
        if level < len(config.channels) - 1:
            yield f"{block}.downsamplers.0.conv", (channels, channels, 3, 3)


def _up_blocks(config: _UNet, time: int) -> Layers:
    before = config.channels[-1]
    levels = list(zip(config.channels, config.depths, strict=True))[::-1]
    for level, (channels, depth) in enumerate(levels):
        block = f"up_blocks.{level}"
        finer = levels[min(level + 1, len(levels) - 1)][0]
        for index in range(_RESNETS + 1):
            # the last resnet of a level meets what came down from the level above
            skipped = finer if index == _RESNETS else channels
            yield from _resnet(f"{block}.resnets.{index}", before + skipped, channels, time)
            yield from _attention(f"{block}.attentions.{index}", channels, depth, config)
            before = channels
        if level < len(levels) - 1:
            yield f"{block}.upsamplers.0.conv", (channels, channels, 3, 3)


def _embedding(path: str, inputs: int, width: int) -> Layers:
    yield f"{path}.linear_1", (width, inputs)
    yield f"{path}.linear_2", (width, width)


def _resnet(path: str, inputs: int, outputs: int, time: int) -> Layers:
    yield f"{path}.conv1", (outputs, inputs, 3, 3)
    yield f"{path}.time_emb_proj", (outputs, time)
    yield f"{path}.conv2", (outputs, outputs, 3, 3)
    if inputs != outputs:
        yield f"{path}.conv_shortcut", (outputs, inputs, 1, 1)


def _attention(path: str, width: int, depth: int, config: _UNet) -> Layers:
    square = (width, width) if config.linear else (width, width, 1, 1)
    for side in ("proj_in", "proj_out") if depth else ():
        yield f"{path}.{side}", square
    for index in range(depth):
        block = f"{path}.transformer_blocks.{index}"
        for attention, context in (("attn1", width), ("attn2", config.cross)):
            yield f"{block}.{attention}.to_q", (width, width)
            yield f"{block}.{attention}.to_k", (width, context)
            yield f"{block}.{attention}.to_v", (width, context)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)


def _text(config: _Text) -> Layers:
    width = config.width
    for index in range(config.layers):
        layer = f"encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{name}", (width, width)
        yield f"{layer}.mlp.fc1", (4 * width, width)
        yield f"{layer}.mlp.fc2", (width, 4 * width)
    if config.projection:
        yield "text_projection", (width, width)
