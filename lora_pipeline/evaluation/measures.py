"""Means over pictures with bootstrap intervals, and distances between sets of embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` pictures with a 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def estimate(values: np.ndarray, rng: np.random.Generator) -> Estimate:
    """The mean of `values` (n,), n at least 1, and its percentile bootstrap interval (Efron 1979)."""
    picks = rng.integers(len(values), size=(RESAMPLES, len(values)))
    means = values[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def centroid(vectors: Tensor) -> Tensor:
    """The mean direction of unit rows (n, d): a unit vector (d,)."""
    return F.normalize(vectors.mean(0), dim=0)


def likeness(vectors: Tensor, reference: Tensor) -> np.ndarray:
    """Cosines (n,) of unit rows (n, d) with the centroid of unit rows `reference` (m, d)."""
    cosines: np.ndarray = (vectors @ centroid(reference)).numpy()
    return cosines


def drift(vectors: Tensor, reference: Tensor) -> float:
    """The squared distance of the two sets' mean vectors, unbiased: how far the class as a whole has moved.

    The maximum mean discrepancy with a linear kernel (Gretton et al. 2012, lemma 6), over pairs of different pictures.
    Two samples of one distribution give 0 on average at any size, sometimes a little below; the plain distance of their
    means would grow as the samples shrink (0.09 for 12 pictures of the toy world).
    """
    between = 1 - float((vectors @ reference.T).mean())
    return 2 * between - diversity(vectors) - diversity(reference)


def diversity(vectors: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of different rows, in [0, 2]; 0 for fewer than two."""
    count = len(vectors)
    if count < 2:
        return 0.0
    cosines = vectors @ vectors.T
    return float((count * count - cosines.sum() - (count - torch.trace(cosines))) / (count * (count - 1)))
