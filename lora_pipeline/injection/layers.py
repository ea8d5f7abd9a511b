"""A frozen layer with low-rank branches beside it: y = W x + Σ weight · (alpha / rank) · up(down(x)).

Hu et al. 2021, arXiv:2106.09685. The frozen layer is wrapped, never copied or changed, so that taking the wrapper away
restores the model bit for bit. Factors are float32 whatever the layer's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_pipeline.adapters.lora import LoraFactors

# Up to this many values in a weight, changing it costs less than multiplying every input by two thin factors.
_SMALL_WEIGHT = 2**16


class LoraBranch(nn.Module):
    """One adapter's factors in one layer.

    Attributes:
        down, up: float32 parameters, see `LoraFactors`.
        alpha: The change is multiplied by alpha / rank.
        weight: A multiplier that may be set at any time; 0 switches the branch off at no cost.
    """

    def __init__(self, factors: LoraFactors, trainable: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down.detach().float().clone(), requires_grad=trainable)
        self.up = nn.Parameter(factors.up.detach().float().clone(), requires_grad=trainable)
        self.alpha = factors.alpha
        self.weight = 1.0

    @property
    def gain(self) -> float:
        """What the change is multiplied by at this moment: weight * alpha / rank."""
        return self.weight * self.alpha / self.down.shape[0]

    def factors(self) -> LoraFactors:
        """A copy of the factors; `weight` is a matter of the moment and not part of them."""
        return LoraFactors(self.down.detach().clone(), self.up.detach().clone(), self.alpha)


class InjectedLayer(nn.Module):
    """What both kinds of injected layers share.

    Args:
        base: The layer, which stays what it is.
        target: Its target name.
    """

    base: nn.Linear | nn.Conv2d

    def __init__(self, base: nn.Linear | nn.Conv2d, target: str) -> None:
        super().__init__()
        self.base = base
        self.target = target
        self.branches: dict[str, LoraBranch] = {}
        self.stack = nn.ModuleList()

    def add_branch(self, name: str, branch: LoraBranch) -> None:
        """Registers a branch; a dict alone would not follow `.to()`, a ModuleDict would not take every name."""
        self.branches[name] = branch
        self.stack.append(branch)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs and outputs are the base layer's, in shape and dtype."""
        output: Tensor = self.base(inputs)
        for branch in self.branches.values():
            if branch.weight != 0.0:
                output = self.changed(output, inputs, branch)
        return output

    def changed(self, output: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
        """The output with one branch's change added."""
        raise NotImplementedError

    def product(self, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up(down(inputs)), of the output's shape and the factors' dtype."""
        raise NotImplementedError


class LoraInjectedLinear(InjectedLayer):
    """A linear layer with branches: (..., in) -> (..., out)."""

    base: nn.Linear

    def forward(self, inputs: Tensor) -> Tensor:
        """See `InjectedLayer`; a branch that learns alone in a small layer changes the weight, for the same sum."""
        branch = self._learner()
        if branch is None:
            return super().forward(inputs)
        weight = torch.addmm(self.base.weight, branch.up, branch.down, alpha=branch.gain)
        return F.linear(inputs, weight, self.base.bias)

    def _learner(self) -> LoraBranch | None:
        """The layer's one branch, if it is better added to the weight: small, in float32, and learning."""
        if len(self.branches) != 1 or self.base.weight.numel() > _SMALL_WEIGHT or not torch.is_grad_enabled():
            return None
        (branch,) = self.branches.values()
        suits = branch.up.requires_grad and branch.weight != 0.0 and self.base.weight.dtype == branch.up.dtype
        return branch if suits else None

    def changed(self, output: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
        """`output` (..., out) plus the branch's change for `inputs` (..., in), in the dtype of `output`."""
        hidden = F.linear(inputs.to(branch.down.dtype), branch.down)
        if output.dtype != hidden.dtype:  # sum in float32, round once
            return (output.float() + branch.gain * F.linear(hidden, branch.up)).to(output.dtype)
        rows = output.reshape(-1, output.shape[-1])
        changes = hidden.reshape(-1, hidden.shape[-1])
        return torch.addmm(rows, changes, branch.up.t(), alpha=branch.gain).view(output.shape)

    def product(self, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """(..., in) by `down` (rank, in) and `up` (out, rank) -> (..., out)."""
        return F.linear(F.linear(inputs.to(down.dtype), down), up)


class LoraInjectedConv2d(InjectedLayer):
    """A convolution with branches: `down` has its kernel, stride, padding, dilation and groups, `up` is 1 x 1."""

    base: nn.Conv2d

    def changed(self, output: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
        """`output` (n, out, h, w) plus the branch's change for `inputs`, in the dtype of `output`."""
        change = self.product(inputs, branch.down, branch.up)
        if output.dtype != change.dtype:
            return (output.float() + branch.gain * change).to(output.dtype)
        return torch.add(output, change, alpha=branch.gain)

    def product(self, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """(n, in, h, w) by `down` (rank, in / groups, kernel) and `up` (out, rank, 1, 1) -> (n, out, h', w')."""
        groups = self.base.groups
        down = down.repeat(groups, 1, 1, 1) if groups > 1 else down
        hidden = self.base._conv_forward(inputs.to(down.dtype), down, None)  # knows every padding mode
        return F.conv2d(hidden, up, groups=groups)
