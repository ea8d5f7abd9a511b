"""The adapter of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_pipeline.adapters.adapter import Adapter, Json, check_base
from lora_pipeline.adapters.compression import truncate
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.errors import ParamsError


@dataclass(frozen=True)
class Extraction:
    """An adapter, and what the cut to its rank cost.

    Args:
        adapter: The adapter.
        residuals: By target, ||ΔW - ΔW'|| / ||ΔW|| in [0, 1].
        residual: The same over all targets together.
    """

    adapter: Adapter
    residuals: Mapping[str, float]
    residual: float


def extract(tuned: Adapter, base: str, rank: int | None, provenance: Mapping[str, Json]) -> Extraction:
    """Takes the adapter out of a training run's result.

    Args:
        tuned: What training wrote.
        base: The fingerprint of the base it should have been trained on.
        rank: Cut every layer to this rank; None keeps the trained rank.
        provenance: Added to what training recorded.

    Raises:
        CorruptError: Trained on another base.
        ParamsError: The rank is below 1.
    """
    if rank is not None and rank < 1:
        raise ParamsError("extract.rank", f"{rank} is below 1", "use 1 or more, or null to keep the trained rank")
    check_base("tuned", tuned, base)
    factors: dict[str, LoraFactors] = {}
    residuals: dict[str, float] = {}
    lost, total = 0.0, 0.0
    for target, trained in tuned.factors.items():
        rule = RankRule("rank", rank if rank is not None else trained.rank)
        factors[target], residuals[target] = truncate(trained, rule)
        energy = squared_norm(trained)
        lost, total = lost + residuals[target] ** 2 * energy, total + energy
    residual = (lost / total) ** 0.5 if total else 0.0
    document = {**tuned.provenance, **provenance, "base": base, "residual": round(residual, 6)}
    return Extraction(replace(tuned, factors=factors, provenance=document), residuals, residual)


def squared_norm(factors: LoraFactors) -> float:
    """||ΔW||² from the rank x rank Gram matrices: tr((upᵀ up)(down downᵀ))."""
    up, down = factors.up.double().flatten(1) * factors.scale, factors.down.double().flatten(1)
    return float(((up.T @ up) * (down @ down.T)).sum())
