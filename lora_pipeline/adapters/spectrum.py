"""The best low-rank product for a full matrix (Eckart & Young 1936), at the cost of what is kept of it.

A singular value decomposition computes everything and throws nearly all of it away. Where the rank is bounded, random
projections find the leading directions (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4); where most of them are
needed, they are eigenvectors of the Gram matrix of the short side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, yet not exported to type checkers

from lora_pipeline.adapters.ranks import RankRule

# With these the error is the optimum's to 4 digits, even where the singular values fall off slowly.
_OVERSAMPLING = 32
_POWER_ITERATIONS = 4
_FIRST_LOOK = 64
_COLUMNS = 4096  # of the double-precision copy that there is at a time


@dataclass(frozen=True, eq=False)
class LowRank:
    """A product of two factors in place of a matrix.

    Args:
        up: (m, rank) float32.
        down: (rank, n) float32. The singular values are split evenly between the two.
        norm: The Frobenius norm of the matrix.
        residual: ||matrix - up @ down|| / ||matrix||, measured, so that rounding is part of it.
    """

    up: Tensor
    down: Tensor
    norm: float
    residual: float

    @property
    def rank(self) -> int:
        """Columns of `up`, rows of `down`."""
        return self.up.shape[1]

    @property
    def energy(self) -> float:
        """The share of the squares of all singular values that is kept, in [0, 1]."""
        return 1.0 - self.residual**2


def low_rank(matrix: Tensor, rule: RankRule) -> LowRank:
    """Cuts a matrix down to the rank that a rule allows.

    The same matrix gives the same factors: the random projection is always the same draw.

    Args:
        matrix: (m, n), finite, of any floating-point dtype, on any device; the factors lie there too.
        rule: How many singular values to keep. At least 1 is kept; a matrix of zeros gives factors of zeros.
    """
    matrix = matrix.float()
    norm = frobenius_norm(matrix)
    if norm == 0.0:
        return LowRank(matrix.new_zeros(matrix.shape[0], 1), matrix.new_zeros(1, matrix.shape[1]), 0.0, 0.0)
    wide = matrix.shape[0] <= matrix.shape[1]
    basis, rows = _leading(matrix if wide else matrix.T, rule, norm)
    # a direction whose singular value is 0 has a row of zeros, and stays zero
    root = torch.linalg.vector_norm(rows, dim=1).sqrt()
    left, right = basis * root, rows / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None]
    up, down = (left, right) if wide else (right.T.contiguous(), left.T.contiguous())
    return LowRank(up, down, norm, relative_residual(matrix, up, down, norm))


def relative_residual(matrix: Tensor, up: Tensor, down: Tensor, norm: float) -> float:
    """||matrix - up @ down|| / norm, of float32 tensors."""
    return frobenius_norm(torch.addmm(matrix, up, down, alpha=-1.0)) / norm


def frobenius_norm(tensor: Tensor) -> float:
    """Of a float32 tensor of any shape: rows in single precision and their sum in double, without a copy in double."""
    rows = torch.linalg.vector_norm(tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1), dim=1)
    return float(torch.linalg.vector_norm(rows.double()))


def _leading(short: Tensor, rule: RankRule, norm: float) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors as columns, (m, rank), and their products with the matrix, (rank, n).

    Few are looked for first: where the rule is met by fewer, no more are needed.

    Args:
        short: (m, n) with m <= n.
        rule: See `low_rank`.
        norm: The Frobenius norm of the matrix.
    """
    side = short.shape[0]
    bound = min(int(rule.value) if rule.kind == "rank" else side, rule.at_most or side, side)
    most = bound if rule.kind == "rank" else min(bound, _FIRST_LOOK)
    while 2 * (most + _OVERSAMPLING) <= side:
        basis, rows = _by_projection(short, rule, most, norm)
        if most == bound or basis.shape[1] < most:
            return basis, rows
        most = min(4 * most, bound)
    return _by_gram_matrix(short, rule)


def _by_projection(short: Tensor, rule: RankRule, most: int, norm: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(short.shape[1], most + _OVERSAMPLING, generator=generator).to(short.device)
    basis, _ = torch.linalg.qr(short @ draw)
    for _ in range(_POWER_ITERATIONS):
        along, _ = torch.linalg.qr(short.T @ basis)
        basis, _ = torch.linalg.qr(short @ along)
    rows = basis.T @ short
    values, vectors = _eigen(rows)
    keep = rule.choose(values[:most], total=norm**2)
    vectors = vectors[:, :keep].float()
    return basis @ vectors, vectors.T @ rows


def _by_gram_matrix(short: Tensor, rule: RankRule) -> tuple[Tensor, Tensor]:
    values, vectors = _eigen(short)
    basis = vectors[:, : rule.choose(values)].float()
    return basis, basis.T @ short


def _eigen(short: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and left singular vectors, both double.

    From the Gram matrix, which squares the condition number: in double, values below 1e-8 of the largest are noise.
    """
    gram = torch.zeros(short.shape[0], short.shape[0], dtype=torch.float64, device=short.device)
    for columns in short.split(_COLUMNS, dim=1):
        columns = columns.double()
        gram.addmm_(columns, columns.T)
    try:
        values, vectors = torch.linalg.eigh(gram)
    except LinAlgError:  # LAPACK gives up on some matrices with many equal eigenvalues
        vectors, values, _ = torch.linalg.svd(short.double(), full_matrices=False)
        return values, vectors
    return values.clamp_min(0.0).sqrt().flip(0), vectors.flip(1)
