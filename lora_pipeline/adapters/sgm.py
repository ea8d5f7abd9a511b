"""The names of a UNet's layers in the original checkpoints (CompVis' and Stability's SGM), for the frozen families.

They number the blocks through: `input_blocks.N`, `middle_block.N`, `output_blocks.N`. In each, `0` is a resnet, then
comes an attention where there is one, then on the way up an upsampler; a downsampler is a block of its own.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cache
from types import MappingProxyType

from lora_pipeline.adapters.targets import UNET, module_path, root
from lora_pipeline.adapters.topology import layers

_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PER_LEVEL = 3  # numbers a level takes: two resnets and a sampler on the way down, three resnets on the way up


@cache
def sgm_names(family: str) -> Mapping[str, str]:
    """SGM's module path by diffusers' module path, for every layer of a UNet.

    Args:
        family: One of `topology.FAMILIES`.
    """
    paths = {module_path(target) for target in layers(family) if target.startswith(root(UNET))}
    return MappingProxyType({path: _sgm(path, paths) for path in paths})


def _sgm(path: str, paths: Container[str]) -> str:
    if path in _OUTER:
        return _OUTER[path]
    block, _, rest = path.partition(".")
    if block == "mid_block":
        kind, index, layer = rest.split(".", 2)
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_RESNET.get(layer, layer)}"
    level, kind, index, layer = rest.split(".", 3)
    first = _PER_LEVEL * int(level)
    if kind == "downsamplers":
        return f"input_blocks.{first + _PER_LEVEL}.0.op"
    if kind == "upsamplers":
        attended = f"{block}.{level}.attentions.0.proj_in" in paths
        return f"output_blocks.{first + _PER_LEVEL - 1}.{2 if attended else 1}.conv"
    # the first input block is conv_in
    start, first = ("input_blocks", first + 1) if block == "down_blocks" else ("output_blocks", first)
    return f"{start}.{first + int(index)}.{int(kind == 'attentions')}.{_RESNET.get(layer, layer)}"
