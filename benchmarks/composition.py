"""Two adapters into one, against PEFT's `add_weighted_adapter`: `python -m benchmarks.composition [--json]`.

PEFT's `svd` forms the full change of each layer and decomposes it; its `cat` stacks the factors, as ours does. Its
times include making the third adapter's layer, which it cannot do without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.rows import Row, seconds, show
from lora_pipeline.adapters.compression import truncate
from lora_pipeline.adapters.lora import LoraFactors, concatenated
from lora_pipeline.adapters.ranks import RankRule

WIDTH, RANK = 1280, 16
WEIGHTS = {"first": 0.7, "second": 0.5}
ALPHAS = {"first": 16.0, "second": 8.0}
TARGET = 100.0


@dataclass(frozen=True)
class Peer:
    """A model of one linear layer with two adapters of PEFT's, and their factors as ours."""

    model: PeftModel
    parts: list[tuple[LoraFactors, float]]

    def add(self, kind: str, rank: int | None) -> None:
        """PEFT's third adapter, in place of what it had under that name."""
        if "both" in self.model.peft_config:
            self.model.delete_adapter("both")
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        self.model.add_weighted_adapter(names, weights, "both", combination_type=kind, svd_rank=rank)

    def delta(self) -> Tensor:
        """What the third adapter changes."""
        layer: Any = self.model.get_submodule("base_model.model.0")
        delta: Tensor = layer.get_delta_weight("both").detach()
        return delta


def rows() -> list[Row]:
    """The rows of this benchmark."""
    peer = _peer()
    truth = sum((weight * factors.delta().double() for factors, weight in peer.parts), torch.zeros(()).double())
    rule = RankRule("rank", RANK)
    size = f"two adapters of rank {RANK} of a {WIDTH} x {WIDTH} layer"
    svd = _row(
        f"compose {size} and cut to rank {RANK}, PEFT svd",
        truth, lambda: truncate(concatenated(peer.parts), rule)[0], peer, ("svd", RANK), TARGET,
    )  # fmt: skip
    cat = _row(f"compose {size} exactly, PEFT cat", truth, lambda: concatenated(peer.parts), peer, ("cat", None), None)
    return [svd, cat]


def _row(
    what: str,
    truth: Tensor,
    ours: Callable[[], LoraFactors],
    peer: Peer,
    kind: tuple[str, int | None],
    target: float | None,
) -> Row:
    peer.add(*kind)
    errors = [float((delta - truth).norm() / truth.norm()) for delta in (ours().delta(), peer.delta())]
    mine, theirs = seconds(ours, 50), seconds(lambda: peer.add(*kind), 5)
    ratio = theirs / mine
    what += f": ms; relative errors {errors[0]:.4g} and {errors[1]:.4g}"
    return Row(what, 1e3 * mine, 1e3 * theirs, ratio, target, None if target is None else ratio >= target)


def _peer() -> Peer:
    torch.manual_seed(0)
    configs = {
        name: LoraConfig(r=RANK, lora_alpha=int(ALPHAS[name]), target_modules=["0"], init_lora_weights=False)
        for name in WEIGHTS
    }
    model = get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), configs["first"], "first")
    model.add_adapter("second", configs["second"])
    layer: Any = model.get_submodule("base_model.model.0")
    parts = [
        (LoraFactors(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), ALPHAS[name]), weight)
        for name, weight in WEIGHTS.items()
    ]
    return Peer(model, parts)


if __name__ == "__main__":
    show(rows(), sys.argv)
