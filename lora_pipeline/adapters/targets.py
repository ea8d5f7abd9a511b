"""Names of the layers an adapter changes.

`unet.<module path as diffusers spells it>`, `text_encoder.text_model.<module path>`, and for SDXL's second encoder
`text_encoder_2.text_model.<module path>`. Published files always write `text_model.`; transformers 5 dropped that level
from its live module names and from the checkpoints it saves.
"""

from __future__ import annotations

UNET = "unet"
TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"
MODELS = (UNET, TEXT_ENCODER, TEXT_ENCODER_2)
_ROOTS = {
    UNET: "unet.", TEXT_ENCODER: "text_encoder.text_model.", TEXT_ENCODER_2: "text_encoder_2.text_model.",
}  # fmt: skip


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
