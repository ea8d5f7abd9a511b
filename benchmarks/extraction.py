"""Extraction of every weight of Stable Diffusion 1.5's UNet, against singular value decompositions.

`python -m benchmarks.extraction [--json]`; most of its minutes are the full decompositions'. A peer decomposes each
distinct shape once, and its time counts as often as the shape occurs; ours decomposes every weight.
"""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.rows import Row, seconds, show
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.spectrum import low_rank

RANK, ENERGY = 32, 0.9
TARGET = 20.0
Shape = tuple[int, int]
CONFIG = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


@dataclass
class Total:
    """Of all weights together.

    Args:
        time: Seconds.
        lost: The sum of the squares of what was cut off.
        whole: The sum of the squares of the changes.
    """

    time: float = 0.0
    lost: float = 0.0
    whole: float = 0.0

    @property
    def error(self) -> float:
        """The relative error of all layers together."""
        return math.sqrt(self.lost / self.whole)


def shapes() -> Counter[Shape]:
    """How often each shape occurs; a convolution is flattened to (out, in x height x width)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIG)
    weights = (parameter.flatten(1) for parameter in unet.parameters() if parameter.ndim in (2, 4))
    return Counter((weight.shape[0], weight.shape[1]) for weight in weights)


def change(shape: Shape) -> Tensor:
    """What tuning might change: singular values falling as i^-0.7, and 5 % of noise."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    count = min(256, *shape)
    left = torch.randn(shape[0], count, generator=generator) / shape[0] ** 0.5
    right = torch.randn(count, shape[1], generator=generator) / shape[1] ** 0.5
    signal: Tensor = left * torch.arange(1, count + 1).pow(-0.7) @ right
    noise = torch.randn(shape, generator=generator)
    noise *= 0.05 * float(signal.norm() / noise.norm())
    return signal.add_(noise)


def ours(counts: Mapping[Shape, int], rule: RankRule) -> Total:
    """Every weight, one after the other."""
    total = Total()
    for shape, count in counts.items():
        matrix = change(shape)
        for _ in range(count):
            total.time += seconds(lambda matrix=matrix: low_rank(matrix, rule), repeats=1)  # type: ignore[misc]
        found = low_rank(matrix, rule)
        total.lost += count * (found.residual * found.norm) ** 2
        total.whole += count * found.norm**2
    return total


def peer(counts: Mapping[Shape, int], *, full: bool) -> Total:
    """Each shape once, weighted; cut to the same rank."""
    total = Total()
    for shape, count in counts.items():
        matrix = change(shape)
        found: list[Tensor] = []

        def decompose(matrix: Tensor = matrix, found: list[Tensor] = found) -> None:
            found[:] = torch.linalg.svd(matrix, full_matrices=full)

        total.time += count * seconds(decompose, repeats=1)
        total.lost += count * float(found[1][RANK:].double().square().sum())
        total.whole += count * float(matrix.double().square().sum())
    return total


def peak() -> float:
    """The most memory this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows() -> list[Row]:
    """Measures; ours first, so that its peak of memory is its own."""
    counts = shapes()
    weights = f"{sum(counts.values())} weights of SD1.5's UNet"
    change(max(counts, key=lambda shape: shape[0] * shape[1]))
    start = peak()
    projected, our_peak = ours(counts, RankRule("rank", RANK)), peak()
    by_energy = ours(counts, RankRule("energy", ENERGY))
    thin = peer(counts, full=False)
    full, full_peak = peer(counts, full=True), peak()

    def faster(what: str, mine: Total, other: Total, target: float | None) -> Row:
        ratio = other.time / mine.time
        return Row(what, mine.time, other.time, ratio, target, None if target is None else ratio >= target)

    same = full.error / projected.error
    memory = (max(1.0, our_peak - start), full_peak - start)
    return [
        faster(f"seconds, {weights} at rank {RANK}, against full SVD", projected, full, TARGET),
        faster(f"seconds, {weights} at rank {RANK}, against thin SVD", projected, thin, None),
        faster(f"seconds, {weights} by energy {ENERGY} of each, against thin SVD", by_energy, thin, None),
        Row(f"relative error at rank {RANK}, of full SVD", projected.error, full.error, same, 0.999, same >= 0.999),
        Row(
            "MB of memory beyond what making the matrices takes, against full SVD",
            *memory,
            memory[1] / memory[0],
            None,
            None,
        ),
    ]


if __name__ == "__main__":
    show(rows(), sys.argv[1:])
