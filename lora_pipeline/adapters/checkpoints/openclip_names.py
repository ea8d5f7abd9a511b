"""The text encoder's layers as OpenCLIP spells them, which single files of SD2 and SDXL kept.

Its attention holds query, key and value in one matrix, one below the other, and its projection is transposed.
Source: mlfoundations/open_clip, src/open_clip/transformer.py, `TextTransformer`.
"""

from __future__ import annotations

from collections.abc import Collection

from lora_pipeline.adapters.checkpoints.renaming import Pairs, count, renamed

PROJECTION = ("text_projection.weight", "text_projection")
_POSITIONS = ("embeddings.position_embedding.weight", "positional_embedding")
_PARTS = ("q_proj", "k_proj", "v_proj")


def fused_of_single_file(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The parameters of transformers' CLIP in each of OpenCLIP's; unknown ones are left out.

    Args:
        names: All names in the single file, below the encoder.
    """
    layers = count(names, r"transformer\.resblocks\.(\d+)\.")
    return {theirs: ours for theirs, ours in _fused(layers).items() if theirs in names} | _plain(
        names, {theirs: ours for ours, theirs in _pairs(layers)}
    )


def fused_of_diffusers(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """As `fused_of_single_file`, from the names below `text_model.` in diffusers' folder."""
    layers = count(names, r"encoder\.layers\.(\d+)\.")
    fused = {theirs: ours for theirs, ours in _fused(layers).items() if set(ours) <= set(names)}
    known = _plain(names, dict(_pairs(layers)))
    return fused | {theirs[0]: (ours,) for ours, theirs in known.items()}


def _plain(names: Collection[str], beginnings: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: (other,) for name in names if (other := renamed(name, beginnings)) is not None}


def _fused(layers: int) -> dict[str, tuple[str, ...]]:
    fused: dict[str, tuple[str, ...]] = {theirs: (ours,) for ours, theirs in (PROJECTION, _POSITIONS)}
    for layer in range(layers):
        for kind in ("weight", "bias"):
            ours = tuple(f"encoder.layers.{layer}.self_attn.{part}.{kind}" for part in _PARTS)
            fused[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = ours
    return fused


def _pairs(layers: int) -> Pairs:
    pairs: Pairs = [("embeddings.token_embedding.", "token_embedding."), ("final_layer_norm.", "ln_final.")]
    for layer in range(layers):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        pairs += [
            (f"{ours}.layer_norm1.", f"{theirs}.ln_1."),
            (f"{ours}.layer_norm2.", f"{theirs}.ln_2."),
            (f"{ours}.mlp.fc1.", f"{theirs}.mlp.c_fc."),
            (f"{ours}.mlp.fc2.", f"{theirs}.mlp.c_proj."),
            (f"{ours}.self_attn.out_proj.", f"{theirs}.attn.out_proj."),
        ]
    return pairs
