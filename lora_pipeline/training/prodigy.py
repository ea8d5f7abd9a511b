"""Prodigy: Adam that estimates its own learning rate (Mishchenko & Defazio 2023, arXiv:2306.06101, algorithm 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Prodigy(torch.optim.Optimizer):
    """Its step size is the learning rate times an estimate `d` of how far the start is from a solution.

    `d` starts at `d0` and only grows. All groups share it; a group's learning rate is its γ. The estimate expects
    learning rates near 1.

    Args:
        params: Parameters or groups of them.
        lr: γ.
        betas: Of both moments, in [0, 1).
        eps: Times `d`, beside the root of the second moment.
        weight_decay: Decoupled, as in AdamW: x -= γ d · weight_decay · x.
        d0: Where `d` starts, above 0.
        d_coef: Times the estimate; above 1 learns faster.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, d0: float = 1e-6, d_coef: float = 1.0,
    ) -> None:  # fmt: skip
        if not (d0 > 0 and d_coef > 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"d0 {d0}, d_coef {d_coef}, eps {eps} and betas {betas}: out of range")
        own = {"d": d0, "numerator": 0.0, "d_coef": d_coef}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **own})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        if closure is not None:
            raise ValueError("a closure is not for this optimiser")
        d: float = self.param_groups[0]["d"]
        changes, sizes = [], []
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                change, size = self._gather(parameter, group, d)
                changes.append(change)
                sizes.append(size)
        if not changes:
            return
        change, size = torch.stack([torch.stack(changes).sum(), torch.stack(sizes).sum()]).tolist()
        for group in self.param_groups:
            group["numerator"] = group["betas"][1] ** 0.5 * group["numerator"] + change
            if size > 0:
                group["d"] = max(d, group["d_coef"] * group["numerator"] / size)
            for parameter in (each for each in group["params"] if each.grad is not None):
                self._move(parameter, group, d)

    def _gather(self, parameter: Tensor, group: dict[str, Any], d: float) -> tuple[Tensor, Tensor]:
        """Updates the moments and s; gives what joins the numerator, and the sum of |s|, float64 scalars."""
        state, gradient, (first, second) = self.state[parameter], parameter.grad, group["betas"]
        assert gradient is not None
        if not state:
            state["start"] = parameter.detach().clone()
            for name in ("s", "mean", "square"):
                state[name] = torch.zeros_like(parameter)
        root, gain = second**0.5, group["lr"] * d * d
        state["mean"].mul_(first).add_(gradient, alpha=(1 - first) * d)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=(1 - second) * d * d)
        state["s"].mul_(root).add_(gradient, alpha=(1 - root) * gain)
        change = (gradient * (state["start"] - parameter)).sum(dtype=torch.float64)
        return (1 - root) * gain * change, state["s"].abs().sum(dtype=torch.float64)

    def _move(self, parameter: Tensor, group: dict[str, Any], d: float) -> None:
        state, size = self.state[parameter], group["lr"] * d
        if group["weight_decay"]:
            parameter.mul_(1 - size * group["weight_decay"])
        parameter.addcdiv_(state["mean"], state["square"].sqrt().add_(d * group["eps"]), value=-size)
