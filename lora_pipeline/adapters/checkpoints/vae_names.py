"""The autoencoder's layers in single files, whose decoder counts its resolutions from the picture inwards.

Source: CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py, `Encoder` and `Decoder`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lora_pipeline.adapters.checkpoints.renaming import Pairs, count

_INNER = ("norm1.", "conv1.", "norm2.", "conv2.")
_ATTENTION: Pairs = [
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
]
_OLD_ATTENTION = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}
_ATTENTION_WEIGHT = re.compile(r"vae\..*\.attentions\.\d+\.to_\w+(\.0)?\.weight")


def pairs_of_diffusers(names: Collection[str]) -> Pairs:
    """(diffusers', single file's) beginnings of names.

    Args:
        names: All names of the autoencoder's parameters, as diffusers spells them.
    """
    return _pairs(
        count(names, r"encoder\.down_blocks\.(\d+)\."), count(names, r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.")
    )


def pairs_of_single_file(names: Collection[str]) -> Pairs:
    """As `pairs_of_diffusers`, of the names in a single file without `first_stage_model.`."""
    return _pairs(count(names, r"encoder\.down\.(\d+)\."), count(names, r"decoder\.up\.\d+\.block\.(\d+)\."))


def modern(name: str) -> str:
    """The name as diffusers spells it since 0.18, for one of before."""
    if ".attentions." not in name:
        return name
    head, _, tail = name.rpartition(".attentions.0.")
    inner = next((new + tail.removeprefix(old) for old, new in _OLD_ATTENTION.items() if tail.startswith(old)), tail)
    return f"{head}.attentions.0.{inner}"


def is_attention_weight(name: str) -> bool:
    """Whether this weight is a linear layer's in diffusers and a 1 x 1 convolution's in single files."""
    return _ATTENTION_WEIGHT.fullmatch(name) is not None


def _pairs(blocks: int, layers: int) -> Pairs:
    pairs: Pairs = [(f"{name}.", f"{name}.") for name in ("quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.{name}.", f"{half}.{name}.") for name in ("conv_in", "conv_out")]
        pairs.append((f"{half}.conv_norm_out.", f"{half}.norm_out."))
        pairs += [(f"{half}.mid_block.attentions.0.{one}", f"{half}.mid.attn_1.{other}") for one, other in _ATTENTION]
        for index in (0, 1):
            pairs += _resnet(f"{half}.mid_block.resnets.{index}.", f"{half}.mid.block_{index + 1}.")
    for block in range(blocks):
        mirrored = blocks - 1 - block
        for layer in range(layers):  # the encoder has one layer less
            pairs += _resnet(f"encoder.down_blocks.{block}.resnets.{layer}.", f"encoder.down.{block}.block.{layer}.")
            pairs += _resnet(f"decoder.up_blocks.{block}.resnets.{layer}.", f"decoder.up.{mirrored}.block.{layer}.")
        pairs.append((f"encoder.down_blocks.{block}.downsamplers.0.conv.", f"encoder.down.{block}.downsample.conv."))
        pairs.append((f"decoder.up_blocks.{block}.upsamplers.0.conv.", f"decoder.up.{mirrored}.upsample.conv."))
    return pairs


def _resnet(ours: str, theirs: str) -> Pairs:
    return [(ours + name, theirs + name) for name in _INNER] + [(f"{ours}conv_shortcut.", f"{theirs}nin_shortcut.")]
