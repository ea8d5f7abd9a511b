"""Products of products that are products again: what lets every kind of adapter be a LoRA of a higher rank, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

# (rows, rank) and (rank, columns).
Pair = tuple[Tensor, Tensor]


def hadamard(first: Pair, second: Pair) -> Pair:
    """(a b) ∘ (c d) = Σ_ij (a_i ∘ c_j)(b_i ∘ d_j): columns with columns, rows with rows; of the ranks' product."""
    (a, b), (c, d) = first, second
    return (a[:, :, None] * c[:, None, :]).flatten(1), (b[:, None] * d[None]).flatten(0, 1)


def kronecker(first: Pair, second: Pair) -> Pair:
    """(a b) ⊗ (c d) = (a ⊗ c)(b ⊗ d), of the ranks' product; a kernel flattened into d's columns stays innermost."""
    (a, b), (c, d) = first, second
    return torch.kron(a, c), torch.kron(b, d)
