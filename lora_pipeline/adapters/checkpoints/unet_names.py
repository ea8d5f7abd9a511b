"""The UNet's layers in single files: CompVis' numbered input, middle and output blocks, which SGM kept for SDXL.

diffusers groups the same layers by resolution. With L residual layers a resolution, its block b begins at
`input_blocks.{1 + b (L + 1)}`, where the last of each L + 1 is the downsampler, and at `output_blocks.{b (L + 1)}`.
Source: CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py, `UNetModel.__init__`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lora_pipeline.adapters.checkpoints.renaming import Pairs, count

_ENDS: Pairs = [
    ("conv_in.", "input_blocks.0.0."),
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.attentions.0.", "middle_block.1."),
]
_RESNET: Pairs = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
]


def pairs_of_diffusers(names: Collection[str]) -> Pairs:
    """(diffusers', single file's) beginnings of names.

    Args:
        names: All names of the UNet's parameters, as diffusers spells them.
    """
    attended = {int(match[1]) for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    blocks, layers = count(names, r"down_blocks\.(\d+)\."), count(names, r"down_blocks\.0\.resnets\.(\d+)\.")
    return _pairs(blocks, layers, attended)


def pairs_of_single_file(names: Collection[str]) -> Pairs:
    """As `pairs_of_diffusers`, of the names in a single file without `model.diffusion_model.`."""
    steps = count(names, r"input_blocks\.(\d+)\.")
    downsamplers = [int(match[1]) for name in names if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))]
    stride = min(downsamplers, default=steps)
    upsamplers = [int(match[1]) for name in names if (match := re.match(r"output_blocks\.(\d+)\.2\.conv\.", name))]
    return _pairs(steps // max(stride, 1), stride - 1, {step // stride for step in upsamplers})


def _pairs(blocks: int, layers: int, attended: Collection[int]) -> Pairs:
    pairs = [
        *_ENDS,
        *_resnet("mid_block.resnets.0.", "middle_block.0."),
        *_resnet("mid_block.resnets.1.", "middle_block.2."),
    ]
    for block in range(blocks):
        first = block * (layers + 1)
        last = first + layers
        pairs += _layers(f"down_blocks.{block}", "input_blocks", range(first + 1, last + 1))
        pairs += _layers(f"up_blocks.{block}", "output_blocks", range(first, last + 1))
        after = 2 if block in attended else 1
        pairs.append((f"down_blocks.{block}.downsamplers.0.conv.", f"input_blocks.{last + 1}.0.op."))
        pairs.append((f"up_blocks.{block}.upsamplers.0.conv.", f"output_blocks.{last}.{after}.conv."))
    return pairs


def _layers(block: str, blocks: str, steps: range) -> Pairs:
    pairs: Pairs = []
    for layer, step in enumerate(steps):
        pairs += _resnet(f"{block}.resnets.{layer}.", f"{blocks}.{step}.0.")
        pairs.append((f"{block}.attentions.{layer}.", f"{blocks}.{step}.1."))
    return pairs


def _resnet(ours: str, theirs: str) -> Pairs:
    return [(ours + one, theirs + other) for one, other in _RESNET]
