"""Lion: steps of one size, in the direction of a sign (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """x -= lr · (sign(β1 m + (1 - β1) g) + weight_decay · x), then m = β2 m + (1 - β2) g.

    Every value moves by the learning rate, so that it wants one three to ten times smaller than AdamW's.

    Args:
        params: Parameters or groups of them.
        lr: The learning rate.
        betas: β1 and β2, in [0, 1).
        weight_decay: Decoupled.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {betas}: out of range")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        if closure is not None:
            raise ValueError("a closure is not for this optimiser")
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in (each for each in group["params"] if each.grad is not None):
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                direction = mean.lerp(parameter.grad, 1 - first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                mean.lerp_(parameter.grad, 1 - second)
