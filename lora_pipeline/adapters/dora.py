"""A DoRA as a plain adapter: with the base at hand, its change is a matrix like any other.

W' = m (W + ΔW) / ||W + ΔW||, norms by row or by column (Liu et al. 2024, arXiv:2402.09353). The change W' - W holds a
multiple of each row of W, so it is of full rank; at a lower rank it is an approximation, and by how much is told.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.extraction import Cut
from lora_pipeline.adapters.lora import LoraFactors, fitted, times_identity
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.spectrum import low_rank
from lora_pipeline.adapters.weights import Weights
from lora_pipeline.errors import CorruptError


def plain(adapter: Adapter, base: Weights, rule: RankRule | None) -> tuple[Adapter, dict[str, Cut]]:
    """Makes plain factors of every target that has a magnitude; the others stay as they are.

    Args:
        adapter: Of any kind.
        base: The weights it was made for.
        rule: How many singular values of each change to keep; None for all, which is exact.

    Returns:
        An adapter without magnitudes, and by target what was kept of its change.

    Raises:
        CorruptError: A target that the base lacks, or of another shape there.
    """
    factors = dict(adapter.factors)
    cuts = {}
    for target, magnitude in adapter.magnitudes.items():
        name = f"{target}.weight"
        if name not in base.places:
            raise CorruptError(target, "is no layer of this base", "use the base this adapter was trained on")
        fitting = fitted(target, factors[target], base.shape(name))
        change = dora_change(target, base.read(name), fitting, magnitude)
        factors[target], cuts[target] = approximated(change, rule)
    return replace(adapter, factors=factors, magnitudes={}), cuts


def dora_change(target: str, weight: Tensor, factors: LoraFactors, magnitude: Tensor) -> Tensor:
    """What a DoRA adds to a weight, W' - W.

    Args:
        target: The layer, for the error.
        weight: Its weight, (out, in / groups[, height, width]).
        factors: Of the same shape.
        magnitude: (out, 1, ...) or (1, in, ...); axes of 1 at its end may be left out.

    Returns:
        Float64, as the difference of two nearly equal weights needs it. A row or column of zeros stays zero.

    Raises:
        CorruptError: The magnitude is neither by row nor by column of this weight.
    """
    shape = [*magnitude.shape, *[1] * (weight.ndim - magnitude.ndim)]
    by = (weight.shape[0], *[1] * (weight.ndim - 1)), (1, weight.shape[1], *[1] * (weight.ndim - 2))
    if tuple(shape) not in by:
        problem = f"its magnitude {tuple(magnitude.shape)} fits neither rows nor columns of {tuple(weight.shape)}"
        raise CorruptError(target, problem, "use the base this adapter was trained on")
    weight = weight.double()
    changed = weight + factors.delta()
    over = [dimension for dimension, length in enumerate(shape) if length == 1]
    norms = torch.linalg.vector_norm(changed, dim=over, keepdim=True)
    return magnitude.double().reshape(shape) * changed / torch.where(norms > 0, norms, 1.0) - weight


def approximated(change: Tensor, rule: RankRule | None) -> tuple[LoraFactors, Cut]:
    """Factors of a full change.

    Args:
        change: (out, in[, height, width]).
        rule: How many singular values to keep; None for all, exact to float32.

    Returns:
        Factors with alpha = rank, and what was kept.
    """
    matrix = change.flatten(1).float()
    if rule is None:
        up, down = times_identity(matrix)
        cut = Cut(up.shape[1], float(torch.linalg.vector_norm(change)), 0.0)
    else:
        best = low_rank(matrix, rule)
        up, down, cut = best.up, best.down, Cut(best.rank, best.norm, best.residual)
    tail = change.shape[2:]
    up, down = up.reshape(-1, cut.rank, *[1] * len(tail)), down.reshape(cut.rank, change.shape[1], *tail)
    return LoraFactors(down, up, alpha=float(cut.rank)), cut
