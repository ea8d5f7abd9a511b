"""Which layer stands at which position in cloneofsimo's files, frozen: SD 1.x and SD 2.x have the same order.

That program numbered layers as a live model yields them: blocks down, up, and mid last; within a block attentions, then
ResNets; within a transformer block as diffusers declared them at the time. Diffusers 0.15 moved the feed-forward layer
behind the second attention, so that the same number means another layer: `legacy` before, `modern` since. Source:
https://github.com/cloneofsimo/lora, `lora_diffusion/lora.py`; diffusers' `attention.py` of 0.14 and 0.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from lora_pipeline.adapters.targets import TEXT_ENCODER, UNET, target_of

LEGACY, MODERN = "legacy", "modern"
ORDERS = (LEGACY, MODERN)
ATTENTION, GEGLU, RESNET, CLIP_ATTENTION = "Attention", "GEGLU", "ResnetBlock2D", "CLIPAttention"
# The classes whose layers a UNet's part may hold, the usual pair first. Their counts tell which: 144, 224, 128, ...
UNET_CLASSES = ((ATTENTION, GEGLU), (ATTENTION, GEGLU, RESNET), (ATTENTION,), (ATTENTION, RESNET), (RESNET,), (GEGLU,))
TEXT_LAYERS = {"sd1": 12, "sd2": 23}

# Attentions and ResNets of each block; a ResNet that changes the number of channels has a shortcut.
_BLOCKS = [
    *((f"down_blocks.{level}", 2 if level < 3 else 0, 2) for level in range(4)),
    *((f"up_blocks.{level}", 3 if level > 0 else 0, 3) for level in range(4)),
    ("mid_block", 1, 2),
]
_SHORTCUTS = ("down_blocks.1.resnets.0", "down_blocks.2.resnets.0", "up_blocks.")
_QKVO = ("to_q", "to_k", "to_v", "to_out.0")


@cache
def unet_targets(classes: tuple[str, ...], order: str) -> tuple[str, ...]:
    """The UNet's targets by position.

    Args:
        classes: One of `UNET_CLASSES`.
        order: One of `ORDERS`.
    """
    return tuple(target_of(UNET, path) for kind, path in _layers(order) if kind in classes)


@cache
def text_targets(layers: int) -> tuple[str, ...]:
    """The text encoder's targets by position, for an encoder of that many layers."""
    return tuple(
        target_of(TEXT_ENCODER, f"encoder.layers.{layer}.self_attn.{name}")
        for layer in range(layers)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj")
    )


def _layers(order: str) -> Iterator[tuple[str, str]]:
    for block, attentions, resnets in _BLOCKS:
        for index in range(attentions):
            transformer = f"{block}.attentions.{index}.transformer_blocks.0"
            first, second = ([(ATTENTION, f"{transformer}.attn{k}.{name}") for name in _QKVO] for k in (1, 2))
            widening = [(GEGLU, f"{transformer}.ff.net.0.proj")]
            yield from first + (widening + second if order == LEGACY else second + widening)
        for index in range(resnets):
            resnet = f"{block}.resnets.{index}"
            shortcut = ["conv_shortcut"] if resnet.startswith(_SHORTCUTS) else []
            yield from ((RESNET, f"{resnet}.{name}") for name in ["conv1", "time_emb_proj", "conv2", *shortcut])
