"""The names of a UNet's layers in the original checkpoints (CompVis' and Stability's SGM), for the frozen families."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from lora_pipeline.adapters.checkpoints.renaming import renamed
from lora_pipeline.adapters.checkpoints.unet_names import pairs_of_diffusers
from lora_pipeline.adapters.targets import UNET, module_path, root
from lora_pipeline.adapters.topology import layers


@cache
def sgm_names(family: str) -> Mapping[str, str]:
    """SGM's module path by diffusers' module path, for every layer of a UNet.

    Args:
        family: One of `topology.FAMILIES`.
    """
    paths = [module_path(target) for target in layers(family) if target.startswith(root(UNET))]
    beginnings = dict(pairs_of_diffusers(paths))
    return MappingProxyType({path: _renamed(path, beginnings) for path in paths})


def _renamed(path: str, beginnings: Mapping[str, str]) -> str:
    theirs = renamed(f"{path}.", beginnings)
    assert theirs is not None, path
    return theirs.removesuffix(".")
