"""What the keys of an adapter's file say, in every format, without its tensors. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# The key of each module that tells most: what comes down to the rank. `:down` and `.down` are cloneofsimo's and ours.
_DOWN = re.compile(
    r"\.lora_down\.weight|\.lora_A(\.[\w-]+)?\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight|[:.]down"
)
_KINDS = {
    "LoRA": _DOWN,
    "LoHa": re.compile(r"\.hada_w1_b"),
    "LoKr": re.compile(r"\.lokr_w2(_b)?"),
    "full": re.compile(r"\.diff"),
}
_MAGNITUDE = re.compile(r"\.dora_scale|\.lora_magnitude_vector(\.[\w-]+)*|\.magnitude")
_MODELS = (
    ("text_encoder_2", re.compile(r"(lora_te2_|text_encoder_2[.:])")),
    ("text_encoder", re.compile(r"(lora_te1?_|text_encoder[.:]|(base_model\.model\.)?(text_model|encoder)\.)")),
    (
        "unet",
        re.compile(r"(lora_unet_|(base_model\.model\.)?(unet[.:]|(down_blocks|mid_block|up_blocks|conv_|time_)))"),
    ),
)
# Parts of a network, by what diffusers or SGM call their layers; the first that fits.
_PARTS = (
    ("self-attention", re.compile(r"attn1|self_attn")),
    ("cross-attention", re.compile(r"attn2")),
    ("feed-forward", re.compile(r"(^|_)(ff|mlp)_")),
    ("projections", re.compile(r"proj_(in|out)$|text_projection")),
    ("time", re.compile(r"time_emb|add_embedding|label_emb|emb_layers")),
    ("resnets", re.compile(r"resnets|in_layers|out_layers|skip_connection")),
    ("samplers", re.compile(r"samplers|_op$|_conv$")),
    ("numbered", re.compile(r"^(unet|text_encoder)_\d+$")),
)
# The width of what cross-attention looks at, and of the text encoder: each is one family's only, but 768, which is also
# the width of SDXL's first text encoder.
_FAMILIES = {768: "SD1", 1024: "SD2", 2048: "SDXL"}
_CONTEXT = re.compile(r"attn2[._]to_[kv](\.weight)?$")


@dataclass(frozen=True)
class Module:
    """One changed layer.

    Args:
        name: As the file writes it.
        model: `unet`, `text_encoder`, `text_encoder_2`, or `unknown`.
        kind: `LoRA`, `LoHa`, `LoKr` or `full`.
        rank: As the file means it: of a LoHa that of each half, of a LoKr that of the decomposed part, of a full change
            or a full LoKr the most its shape can have.
        inputs: Width of the layer's input; times the kernel where a file flattens it.
    """

    name: str
    model: str
    kind: str
    rank: int
    inputs: int

    @property
    def part(self) -> str:
        """The part of the network that it belongs to."""
        name = re.sub(r"\W", "_", self.name)
        return next((part for part, fits in _PARTS if fits.search(name)), "other")


def modules(shapes: Shapes) -> list[Module]:
    """All changed layers, by the file's names."""
    found = []
    for key, shape in shapes.items():
        for kind, mark in _KINDS.items():
            match = re.search(rf"({mark.pattern})$", key)
            if match and len(shape) in (2, 4):
                name = key[: match.start()]
                rank, inputs = _rank(kind, name, key, shapes), _inputs(name, key, shapes)
                found.append(Module(name, model_of(name), kind, rank, inputs))
                break
    return sorted(found, key=lambda module: module.name)


def magnitudes(shapes: Shapes) -> int:
    """How many layers are DoRA's."""
    return sum(re.search(rf"({_MAGNITUDE.pattern})$", key) is not None for key in shapes)


def model_of(name: str) -> str:
    """The model that a key belongs to, or `unknown`."""
    return next((model for model, starts in _MODELS if starts.match(name)), "unknown")


def family(found: list[Module]) -> str | None:
    """`SD1`, `SD2` or `SDXL` by the widths that only one of them has; None where there is no such layer."""
    if any(module.model == "text_encoder_2" for module in found):
        return "SDXL"
    contexts = [_FAMILIES[module.inputs] for module in found if module.model == "unet" and module.inputs in _FAMILIES]
    if contexts:
        return contexts[0]
    second = any(module.model == "text_encoder" and module.inputs == 1024 for module in found)
    return "SD2" if second else None


def context_width(shapes: Shapes) -> int | None:
    """The width of what cross-attention looks at.

    Args:
        shapes: Of weights, or of changes of them, by target or by key in a checkpoint.
    """
    return next((shape[1] for key, shape in sorted(shapes.items()) if _CONTEXT.search(key) and len(shape) > 1), None)


def family_of_width(width: int | None) -> str | None:
    """The family whose cross-attention looks at something of this width."""
    return _FAMILIES.get(width) if width is not None else None


def _rank(kind: str, name: str, key: str, shapes: Shapes) -> int:
    shape = shapes[key]
    if kind == "full" or (kind == "LoKr" and key.endswith("_w2")):
        inner = shapes.get(f"{name}.lokr_w1_b", ())
        return inner[0] if inner else min(shape[0], math.prod(shape[1:]))
    return shape[0]


def _inputs(name: str, key: str, shapes: Shapes) -> int:
    first = shapes.get(f"{name}.lokr_w1") or shapes.get(f"{name}.lokr_w1_b") or (1, 1)
    return shapes[key][1] * (first[1] if len(first) > 1 else 1)
