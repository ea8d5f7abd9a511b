"""The blocks of a UNet by the names that block weights go by.

They count the CompVis UNet's input and output blocks, as A1111's LoRA Block Weight and kohya's merge scripts do: `BASE`
for the text encoders, `IN00` to `IN11`, `M00` (also `MID`), `OUT00` to `OUT11`. `REST` is ours, for the layers outside
them all: time and class embeddings and the output convolution.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from lora_pipeline.adapters.targets import UNET, root
from lora_pipeline.errors import ParamsError

# Factors by block name or glob of targets, or one number for each block that a vector of that length names.
BlockWeights: TypeAlias = "Mapping[str, float] | Sequence[float]"

BASE, MID, REST = "BASE", "M00", "REST"
_SIDE = {"down": "IN", "up": "OUT"}
_PLACE = re.compile(r"(down|up)_blocks\.(\d+)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.")


def _named(places: str) -> tuple[str, ...]:
    return tuple(places.split())


VECTORS = {
    12: _named("BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"),
    17: _named("BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"),
    20: _named(
        "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08"
    ),
    26: _named(
        "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11 M00"
        " OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    ),
}
BLOCKS = (*VECTORS[26], REST)
_ALIASES = {"MID": MID}


def block_of(target: str) -> str:
    """The block a target belongs to.

    A downsampler is the input block after its resnets, an upsampler part of the last output block beside it.

    Args:
        target: See `targets`.
    """
    if not target.startswith(root(UNET)):
        return BASE
    path = target.removeprefix(root(UNET))
    if path.startswith("mid_block."):
        return MID
    if path == "conv_in":
        return "IN00"
    place = _PLACE.match(f"{path}.")
    if place is None:
        return REST
    side, level, kind, index = place[1], int(place[2]), place[3], int(place[4])
    inner = {"downsamplers": 2, "upsamplers": 2}.get(kind, index)
    return f"{_SIDE[side]}{3 * level + inner + (side == 'down'):02}"


def block_factors(where: str, weights: BlockWeights, targets: Collection[str]) -> dict[str, float]:
    """What each target's change is multiplied by.

    Args:
        where: The key of params.yaml, for the error.
        weights: By block name or glob of targets, where factors that meet multiply and what nothing names has 1; or a
            vector of 12 (SDXL), 17 (SD 1 and 2), 20 (SDXL with convolutions) or 26 numbers (SD 1 and 2 with
            convolutions) in the order of `VECTORS`.
        targets: Of the adapter.

    Raises:
        ParamsError: A vector of another length, or one that says nothing of a block the adapter changes (to some
            programs it is 0 then, to others 1); an unknown block; a glob that matches nothing.
    """
    check_names(where, weights)
    blocks = {target: block_of(target) for target in targets}
    named = weights if isinstance(weights, Mapping) else _by_name(where, weights, set(blocks.values()))
    factors = dict.fromkeys(targets, 1.0)
    for key, factor in named.items():
        for target in _matched(where, key, blocks):
            factors[target] *= factor
    return factors


def check_names(where: str, weights: BlockWeights) -> None:
    """What can be told of block weights without the adapter they are for.

    Raises:
        ParamsError: A vector of a length that no program has, or an unknown block.
    """
    if not isinstance(weights, Mapping):
        if len(weights) not in VECTORS:
            problem = f"has {len(weights)} numbers, a vector has {', '.join(map(str, VECTORS))}"
            raise ParamsError(where, problem, "count them, or write block names: {IN04: 0.5}")
        return
    for key in weights:
        if key not in BLOCKS and key not in _ALIASES and not set(key) & set(".*?["):
            near = difflib.get_close_matches(key, [*BLOCKS, *_ALIASES], n=1)
            fix = f"write {near[0]}" if near else "use BASE, IN00 to IN11, M00, OUT00 to OUT11, REST, or a glob"
            raise ParamsError(where, f"names {key!r}, which is no block", fix)


def _by_name(where: str, vector: Sequence[float], changed: set[str]) -> dict[str, float]:
    names = VECTORS[len(vector)]
    unnamed = sorted(changed - {*names, REST})
    if unnamed:
        problem = f"is a vector of {len(vector)}, which says nothing of {unnamed[0]}, and the adapter changes it"
        raise ParamsError(where, problem, "give all 26 numbers, or block names: {IN04: 0.5}")
    return dict(zip(names, vector, strict=True))


def _matched(where: str, key: str, blocks: Mapping[str, str]) -> list[str]:
    block = _ALIASES.get(key, key)
    if block in BLOCKS:
        return [target for target in blocks if blocks[target] == block]
    matched = [target for target in blocks if fnmatchcase(target, key)]
    if not matched:
        example = min(blocks, default="it has none")
        raise ParamsError(where, f"{key!r} matches no layer of the adapter", f"its layers are named like {example}")
    return matched
