"""Names in files of kohya's scripts and the user interfaces. Needs no torch.

A layer is a prefix and the path of a module with `_` for every dot:

    lora_unet_   the UNet, in diffusers' names or in SGM's (the original checkpoints'): SDXL files use SGM's
    lora_te_     the text encoder; lora_te1_ and lora_te2_ are SDXL's two
    bundle_emb.  no layer, but rows of an embedding under their token

`_` is also inside names. Diffusers' paths are told apart by their closed vocabulary, of which no two words in a row can
be read as others: any network made of these blocks has its names. SGM numbers its blocks through, so those names come
from the frozen tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from lora_pipeline.adapters.sgm import sgm_names
from lora_pipeline.adapters.targets import MODELS, TEXT_ENCODER, TEXT_ENCODER_2, UNET, module_path, root, target_of
from lora_pipeline.adapters.topology import FAMILIES, SDXL

_MODELS = {"lora_unet_": UNET, "lora_te_": TEXT_ENCODER, "lora_te1_": TEXT_ENCODER, "lora_te2_": TEXT_ENCODER_2}
_BUNDLE = "bundle_emb."
PREFIXES = tuple(_MODELS)  # what every layer's name starts with
STARTS = (*PREFIXES, _BUNDLE)  # what every key starts with
_ROWS, _ROWS_OF_TWO, _ROWS_2 = ".emb_params", ".clip_l", ".clip_g"
_ROWS_OF_AUTOMATIC1111 = ".string_to_param.*"
UNET_WORDS = (
    "down_blocks", "mid_block", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers",
    "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in",
    "proj_out", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "time_emb_proj", "time_embedding",
    "add_embedding", "linear_1", "linear_2",
)  # fmt: skip
TEXT_WORDS = (
    "text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2",
    "text_projection",
)  # fmt: skip


def target_of_module(module: str) -> str | None:
    """The target that a file's module name means.

    Args:
        module: The part of a key before its first dot, such as `lora_unet_mid_block_attentions_0_proj_in`.

    Returns:
        The target; None if it is no name of a layer.
    """
    prefix = next((each for each in PREFIXES if module.startswith(each)), None)
    if prefix is None:
        return None
    model, name = _MODELS[prefix], module.removeprefix(prefix)
    path = _dotted(name, UNET_WORDS if model == UNET else TEXT_WORDS)
    if path is None and model == UNET:
        path = _from_sgm().get(name)
    return target_of(model, path) if path else None


def module_of_target(target: str, *, sgm: bool, two_encoders: bool) -> str | None:
    """The module name to write for a target.

    Args:
        target: A target name.
        sgm: Whether to spell SDXL's layers as SGM does.
        two_encoders: Whether the first text encoder is one of two.

    Returns:
        The name, which `target_of_module` reads as the same target; None if there is no such name.
    """
    model = next(each for each in MODELS if target.startswith(root(each)))
    path = module_path(target)
    if model == UNET:
        prefix, path = "lora_unet_", sgm_names(SDXL).get(path, path) if sgm else path
    else:
        prefix = "lora_te2_" if model == TEXT_ENCODER_2 else "lora_te1_" if two_encoders else "lora_te_"
        # text_projection lies beside the text model
        path = path if path == "text_projection" else f"text_model.{path}"
    module = prefix + path.replace(".", "_")
    return module if target_of_module(module) == target else None


def token_of_key(name: str) -> tuple[str, bool] | None:
    """The placeholder token of a bundled embedding.

    Args:
        name: A key of a file.

    Returns:
        The token, and whether its rows are for SDXL's second text encoder; None if the key is of something else.
    """
    for ending in (_ROWS, _ROWS_OF_TWO, _ROWS_2, _ROWS_OF_AUTOMATIC1111):
        if name.startswith(_BUNDLE) and name.endswith(ending):
            return name.removeprefix(_BUNDLE).removesuffix(ending), ending == _ROWS_2
    return None


def key_of_token(token: str, *, second: bool, two_encoders: bool) -> str:
    """The key to write an embedding under; the inverse of `token_of_key`.

    Args:
        token: The placeholder token.
        second: Whether its rows are for the second of two text encoders.
        two_encoders: Whether the base has two.
    """
    return _BUNDLE + token + (_ROWS_2 if second else _ROWS_OF_TWO if two_encoders else _ROWS)


def _dotted(name: str, words: tuple[str, ...]) -> str | None:
    """A path, given its names joined by `_`; None if there are others than these words and numbers."""
    part = _part(words)
    parts, position = [], 0
    while position < len(name):
        match = part.match(name, position)
        if match is None:
            return None
        parts.append(match[1])
        position = match.end()
    return ".".join(parts) if "_".join(parts) == name else None


@cache
def _part(words: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"({'|'.join(longest_first)}|0|[1-9][0-9]*)(?:_|$)")


@cache
def _from_sgm() -> Mapping[str, str]:
    """Diffusers' path by SGM's name, dots gone. The families agree wherever they share a name."""
    return {sgm.replace(".", "_"): path for family in FAMILIES for path, sgm in sgm_names(family).items()}
