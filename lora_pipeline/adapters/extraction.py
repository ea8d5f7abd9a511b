"""An adapter taken out of another: of a training run's result, or of a larger one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lora_pipeline.adapters.adapter import Adapter, Json, check_base, check_understood
from lora_pipeline.adapters.compression import truncate
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.errors import UsageError

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Cut:
    """What became of one layer's change.

    Args:
        rank: Of the factors.
        norm: The Frobenius norm of the whole change ΔW.
        residual: ||ΔW - ΔW'|| / ||ΔW||.
    """

    rank: int
    norm: float
    residual: float

    @property
    def energy(self) -> float:
        """||ΔW'||² / ||ΔW||², which is the share of the squared singular values that is kept."""
        return 1.0 - self.residual**2


@dataclass(frozen=True)
class Extraction:
    """An adapter, and what it leaves out.

    Args:
        adapter: The adapter.
        layers: By target, what was kept of its change.
        left_out: By parameter name, the norms of changes that factors cannot hold, or that were not asked for.
    """

    adapter: Adapter
    layers: Mapping[str, Cut]
    left_out: Mapping[str, float] = field(default_factory=dict)

    @property
    def residual(self) -> float:
        """||ΔW - ΔW'|| / ||ΔW|| over all layers together; what was left out is no part of it."""
        return residual(self.layers)

    @property
    def left_out_share(self) -> float:
        """The share of the squares of all changes that was left out, in [0, 1]."""
        out = math.fsum(norm**2 for norm in self.left_out.values())
        total = out + math.fsum(cut.norm**2 for cut in self.layers.values())
        return out / total if total else 0.0


def residual(layers: Mapping[str, Cut]) -> float:
    """The relative residual of several layers together."""
    lost = math.fsum((cut.residual * cut.norm) ** 2 for cut in layers.values())
    total = math.fsum(cut.norm**2 for cut in layers.values())
    return math.sqrt(lost / total) if total else 0.0


def extract(
    source: Adapter,
    rule: RankRule | None,
    provenance: Mapping[str, Json],
    *,
    base: str | None = None,
    alpha: float | None = None,
    advance: Advance = lambda _done: None,
) -> Extraction:
    """Takes an adapter out of another one.

    Args:
        source: What training wrote, or any other adapter.
        rule: How much of each layer to keep; None keeps all.
        provenance: Added to the source's.
        base: The fingerprint of the base it should have been made for; None asks for no particular one.
        alpha: What alpha every layer should have, by rescaling; None gives cut layers alpha = rank.
        advance: Told how many layers are done.

    Raises:
        CorruptError: Made for another base, or no plain adapter and to be cut.
        UsageError: An alpha that is not above 0.
    """
    if base is not None:
        check_base("tuned", source, base)
    if rule is not None:
        check_understood("tuned", source)
    check_alpha(alpha)
    factors: dict[str, LoraFactors] = {}
    layers: dict[str, Cut] = {}
    for done, (target, trained) in enumerate(source.factors.items(), 1):
        cut, lost = truncate(trained, rule) if rule is not None else (trained, 0.0)
        factors[target] = cut if alpha is None else with_alpha(cut, alpha)
        layers[target] = Cut(cut.rank, math.sqrt(max(0.0, squared_norm(trained))), lost)
        advance(done)
    document = {**source.provenance, **provenance, "residual": round(residual(layers), 6)}
    if base is not None:
        document["base"] = base
    return Extraction(replace(source, factors=factors, provenance=document), layers)


def check_alpha(alpha: float | None) -> None:
    """Refuses an alpha that factors cannot be rescaled to.

    Raises:
        UsageError: It is not a finite number above 0.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise UsageError("--alpha", f"{alpha:g} is not above 0", "use a number such as the rank, or leave it out")


def with_alpha(factors: LoraFactors, alpha: float) -> LoraFactors:
    """The same change as factors of another alpha, both scaled alike: some programs expect a certain one.

    Args:
        factors: Any factors.
        alpha: Above 0.
    """
    gain = math.sqrt(abs(factors.alpha) / alpha)
    return LoraFactors(factors.down.float() * gain, factors.up.float() * math.copysign(gain, factors.alpha), alpha)


def squared_norm(factors: LoraFactors) -> float:
    """||ΔW||² from the rank x rank Gram matrices: tr((upᵀ up)(down downᵀ))."""
    up, down = factors.up.double().flatten(1) * factors.scale, factors.down.double().flatten(1)
    return float(((up.T @ up) * (down @ down.T)).sum())
