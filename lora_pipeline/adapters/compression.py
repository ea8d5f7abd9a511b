"""The best factors of a lower rank, without ever forming the full change.

The QR core: up · down = Q_u (R_u R_dᵀ) Q_dᵀ, so the singular values of the change are those of a rank x rank matrix,
and cutting them off is optimal in the Frobenius norm (Eckart & Young 1936).
"""

from __future__ import annotations

import torch

from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule


def truncate(factors: LoraFactors, rule: RankRule) -> tuple[LoraFactors, float]:
    """Cuts factors down to the rank that a rule allows.

    Args:
        factors: What is to be cut, of any rank.
        rule: How many singular values of the change to keep. Factors of no higher rank come back as they are.

    Returns:
        Factors with alpha = rank, the singular values split evenly between them, and the relative residual
        ||ΔW - ΔW'|| / ||ΔW|| in the Frobenius norm, in [0, 1].
    """
    if rule.kind == "rank" and rule.value >= factors.rank:
        return factors, 0.0
    q_up, r_up = torch.linalg.qr(factors.up.double().flatten(1) * factors.scale)
    q_down, r_down = torch.linalg.qr(factors.down.double().flatten(1).T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    rank = max(1, rule.choose(values))
    if rank >= factors.rank:
        return factors, 0.0
    root = values[:rank].sqrt()
    up = (q_up @ (left[:, :rank] * root)).float().reshape(-1, rank, *factors.up.shape[2:])
    down = ((root[:, None] * right[:rank]) @ q_down.T).float().reshape(rank, *factors.down.shape[1:])
    norm = float(values.norm())
    residual = float(values[rank:].norm()) / norm if norm else 0.0
    return LoraFactors(down, up, alpha=float(rank)), residual
