"""Names of the layers an adapter changes.

`unet.<module path as diffusers spells it>`, `text_encoder.text_model.<module path>`, and for SDXL's second encoder
`text_encoder_2.text_model.<module path>`. Published files always write `text_model.`; transformers 5 dropped that level
from its live module names and from the checkpoints it saves.
"""

from __future__ import annotations

import re

UNET = "unet"
TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"
MODELS = (UNET, TEXT_ENCODER, TEXT_ENCODER_2)
_ROOTS = {
    UNET: "unet.", TEXT_ENCODER: "text_encoder.text_model.", TEXT_ENCODER_2: "text_encoder_2.text_model.",
}  # fmt: skip

# What the paths of the two kinds of models begin with: the children of UNet2DConditionModel and of CLIPTextModel.
_OF_UNET = re.compile(
    r"(conv_in|conv_out|time_embedding|add_embedding|class_embedding|encoder_hid_proj|down_blocks|mid_block|up_blocks)\."
)
_OF_TEXT_ENCODER = re.compile(r"(text_model|encoder\.layers|embeddings|final_layer_norm|text_projection)\.")


def root(prefix: str) -> str:
    """What every target name of a model starts with.

    Args:
        prefix: One of `MODELS`.
    """
    return _ROOTS[prefix]


def is_target(name: str) -> bool:
    """Whether a name is spelled as targets are."""
    return any(name.startswith(start) and len(name) > len(start) for start in _ROOTS.values())


def module_path(target: str) -> str:
    """The module path below the model: without the prefix, and without `text_model.`."""
    start = next(start for start in _ROOTS.values() if target.startswith(start))
    return target.removeprefix(start)


def target_of(prefix: str, path: str) -> str:
    """The target name of a module or checkpoint path, which may or may not carry `text_model.`."""
    if prefix != UNET:
        path = path.removeprefix("text_model.")
    return root(prefix) + path


def published_name(target: str) -> str:
    """As files spell a target: SDXL's projection lies beside `text_model.`, not in it."""
    projection = f"{root(TEXT_ENCODER_2)}text_projection"
    return f"{TEXT_ENCODER_2}.text_projection" if target == projection else target


def model_of(path: str) -> str | None:
    """Which model a module path without a prefix belongs to: `unet`, `text_encoder` or, if it is no such path, None.

    Args:
        path: The path, followed by a dot and a parameter.
    """
    if _OF_UNET.match(path):
        return UNET
    return TEXT_ENCODER if _OF_TEXT_ENCODER.match(path) else None
