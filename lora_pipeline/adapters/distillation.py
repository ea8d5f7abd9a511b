"""The low-rank part of what tuning changed in a whole model: ΔW = W_tuned - W_base, layer by layer.

The difference is made in float32: in half precision a small change is mostly rounding. One layer is in memory at a
time, so a model needs no more than a few copies of its largest weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter, Json
from lora_pipeline.adapters.extraction import Advance, Cut, Extraction, check_alpha, residual, with_alpha
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.spectrum import LowRank, frobenius_norm, low_rank, relative_residual
from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2
from lora_pipeline.adapters.weights import Weights
from lora_pipeline.errors import CorruptError, UsageError

_TOKEN_TABLE = ".text_model.embeddings.token_embedding.weight"
# Matrices that are looked up, not multiplied: no layer that an adapter changes.
_TABLES = (_TOKEN_TABLE, ".text_model.embeddings.position_embedding.weight", "unet.class_embedding.weight")
Tokens = Mapping[str, Sequence[int]]

_TEXT_ENCODERS = (TEXT_ENCODER, TEXT_ENCODER_2)
_FIX = "give the base that the tuned model was made from"


@dataclass(frozen=True)
class Recipe:
    """What to take of a change.

    Args:
        rule: How much of each layer to keep.
        targets: Globs over target names; `*` crosses dots.
        alpha: What alpha every layer should have; None for alpha = rank.
        clamp_quantile: See `clamped`; None, which is better, cuts nothing off.

    Raises:
        UsageError: An alpha or a quantile out of range.
    """

    rule: RankRule
    targets: Sequence[str] = ("*",)
    alpha: float | None = None
    clamp_quantile: float | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.clamp_quantile is not None and not 0.5 < self.clamp_quantile <= 1:
            problem = f"{self.clamp_quantile:g} is not above 0.5, up to 1"
            raise UsageError("--clamp-quantile", problem, "use a number such as 0.99, or better none")


def distil(
    base: Weights,
    tuned: Weights,
    recipe: Recipe,
    provenance: Mapping[str, Json],
    *,
    tokens: Tokens | None = None,
    device: str = "cpu",
    advance: Advance = lambda _done: None,
) -> Extraction:
    """Takes an adapter out of a tuned model.

    Args:
        base: The model it was tuned from.
        tuned: The tuned model, of the same architecture, in any precision.
        recipe: What to take. Layers without a change get no factors.
        provenance: What the adapter is to say of its origin.
        tokens: The tuned model's new tokens, with the rows of the token tables that are theirs.
        device: Where the decompositions are made.
        advance: Told how many parameters of `base` are done.

    Returns:
        The adapter, and the norms of all other changes: of biases, norms, embeddings, and layers no glob matches.

    Raises:
        CorruptError: The models differ in architecture or not at all, or hold NaN or infinity.
        UsageError: A glob that matches nothing.
    """
    names = _shared_names(base, tuned)
    wanted = _wanted(names, base, recipe.targets)
    new_rows = {prefix: _token_rows(f"{prefix}{_TOKEN_TABLE}", tuned, tokens or {}) for prefix in _TEXT_ENCODERS}
    factors: dict[str, LoraFactors] = {}
    layers: dict[str, Cut] = {}
    left_out: dict[str, float] = {}
    for done, name in enumerate(names, 1):
        change = _change(name, base, tuned, tokens or {})
        norm = _norm(name, change)
        target = name.removesuffix(".weight")
        if norm > 0 and name in wanted:
            factors[target], layers[target] = _cut(change.to(device), recipe)
        elif norm > 0:
            left_out[name] = norm
        advance(done)
    if not factors:
        problem = f"changes no layer that was asked for ({len(left_out)} other parameters differ)"
        raise CorruptError("the tuned model", problem, _FIX)
    document = {**provenance, "residual": round(residual(layers), 6)}
    adapter = Adapter(factors, new_rows[TEXT_ENCODER], document, embeddings_2=new_rows[TEXT_ENCODER_2])
    return Extraction(adapter, layers, left_out)


def clamped(matrix: Tensor, found: LowRank, quantile: float) -> LowRank:
    """The factors that other programs write: up = U S and down = V, with outliers cut off.

    Both are clamped to ± the quantile of the signed entries of both together, though they differ in size by orders of
    magnitude. It only does harm (an exact change of rank 32 comes back 10 % wrong at 0.99), and is here for comparison.

    Args:
        matrix: (m, n) float32, what was decomposed.
        found: Its decomposition.
        quantile: In (0.5, 1].
    """
    root = torch.linalg.vector_norm(found.up, dim=0)
    up, down = found.up * root, found.down / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None]
    bound = _quantile(torch.cat([up.flatten(), down.flatten()]), quantile)
    up, down = up.clamp(-bound, bound), down.clamp(-bound, bound)
    return replace(found, up=up, down=down, residual=relative_residual(matrix, up, down, found.norm))


def _quantile(values: Tensor, quantile: float) -> float:
    """Linear between neighbours, as `torch.quantile`, which refuses more than 16 million values."""
    ordered = values.sort().values
    place = quantile * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return float(low + (high - low) * (place - math.floor(place)))


def _shared_names(base: Weights, tuned: Weights) -> list[str]:
    """The names of all floating-point parameters, which both models must have in the same shapes."""
    mine, theirs = set(_floating(base)), set(_floating(tuned))
    for names, place in ((mine - theirs, "base"), (theirs - mine, "tuned model")):
        if names:
            found = f"and {len(names) - 1} other parameters are" if len(names) > 1 else "is"
            raise CorruptError(min(names), f"{found} in the {place} alone: two architectures", _FIX)
    for name in sorted(mine):
        before, after = base.shape(name), tuned.shape(name)
        grown = name.endswith(_TOKEN_TABLE) and before[1:] == after[1:] and before[0] <= after[0]
        if before != after and not grown:
            problem = f"has shape {after} in the tuned model and {before} in the base: two architectures"
            raise CorruptError(name, problem, _FIX)
    return sorted(mine)


def _floating(weights: Weights) -> Iterable[str]:
    return (name for name, place in weights.places.items() if place.entry.dtype.startswith(("F", "BF")))


def _wanted(names: Sequence[str], base: Weights, globs: Sequence[str]) -> set[str]:
    """The weights of linear layers and convolutions whose targets match.

    Raises:
        UsageError: A glob that matches nothing.
    """
    layers = [
        name.removesuffix(".weight")
        for name in names
        if name.endswith(".weight") and len(base.shape(name)) in (2, 4) and not name.endswith(_TABLES)
    ]
    for glob in globs:
        if not any(fnmatchcase(layer, glob) for layer in layers):
            example = layers[len(layers) // 2] if layers else "none"
            raise UsageError(glob, "matches no layer", f"use names like {example!r}")
    return {f"{layer}.weight" for layer in layers if any(fnmatchcase(layer, glob) for glob in globs)}


def _token_rows(table: str, tuned: Weights, tokens: Tokens) -> dict[str, Tensor]:
    """The rows of each new token in one table; none where the model has no such table.

    Raises:
        CorruptError: The table has not so many rows.
    """
    if not tokens or table not in tuned.places:
        return {}
    rows, last = tuned.shape(table)[0], max(max(ids) for ids in tokens.values())
    if last >= rows:
        raise CorruptError(table, f"has {rows} rows, and a token is number {last}", "get the tuned model again")
    values = tuned.read(table).float()
    return {token: values[list(ids)] for token, ids in tokens.items()}


def _change(name: str, base: Weights, tuned: Weights, tokens: Tokens) -> Tensor:
    """Tuned minus base in float32; of a token table, without the rows of new tokens."""
    before, change = base.read(name), tuned.read(name).float()
    shared = change if change.shape == before.shape else change[: before.shape[0]]
    shared -= before
    if name.endswith(_TOKEN_TABLE):
        for ids in tokens.values():
            change[list(ids)] = 0.0
    return change


def _norm(name: str, change: Tensor) -> float:
    norm = frobenius_norm(change)
    if not math.isfinite(norm):
        raise CorruptError(name, "holds NaN or infinity in one of the models", "get that model again")
    return norm


def _cut(change: Tensor, recipe: Recipe) -> tuple[LoraFactors, Cut]:
    matrix = change.flatten(1)
    found = low_rank(matrix, recipe.rule)
    if recipe.clamp_quantile is not None:
        found = clamped(matrix, found, recipe.clamp_quantile)
    tail = [1] * (change.ndim - 2)
    up, down = found.up.cpu().reshape(*found.up.shape, *tail), found.down.cpu().reshape(-1, *change.shape[1:])
    factors = LoraFactors(down, up, alpha=float(found.rank))
    if recipe.alpha is not None:
        factors = with_alpha(factors, recipe.alpha)
    return factors, Cut(found.rank, found.norm, found.residual)
