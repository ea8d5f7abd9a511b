"""A frozen layer with branches beside it: y = W x + Σ weight · (alpha / rank) · up(down(x)), or DoRA's norms of it.

Hu et al. 2021, arXiv:2106.09685. The frozen layer is wrapped, never copied or changed, so that taking the wrapper away
restores the model bit for bit. Factors are float32 whatever the layer's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_pipeline.injection.branches import LokrBranch, LoraBranch

# Up to this many values in a weight, changing it costs less than multiplying every input by two thin factors.
_SMALL_WEIGHT = 2**16


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
        own = output
        for branch in self.branches.values():
            if not branch.acts():
                continue
            if branch.magnitude is None:
                output = self.changed(output, inputs, branch)
            else:
                output = (output.float() + branch.weight * self.renormed(own, inputs, branch)).to(output.dtype)
        return output

    def renormed(self, own: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
        """What a DoRA adds at weight 1, float32: (m / ‖W + ΔW‖ - 1) W x + m / ‖W + ΔW‖ ΔW x.

        Gradients do not flow through the norms (Liu et al. 2024, arXiv:2402.09353, section 4.3).

        Args:
            own: The base layer's output.
            inputs: The layer's.
            branch: With a magnitude by row.
        """
        assert branch.magnitude is not None
        with torch.no_grad():
            changed = self.base.weight.float() + branch.factors().delta()
            norms = torch.linalg.vector_norm(changed.flatten(1), dim=1)
        ratio = self.by_output(branch.magnitude.flatten() / torch.where(norms > 0, norms, 1.0))
        bias = 0.0 if self.base.bias is None else self.by_output(self.base.bias.float())
        product = branch.product(self, branch.kept_inputs(inputs))
        return (ratio - 1.0) * (own.float() - bias) + ratio * branch.scale * product.float()

    def by_output(self, values: Tensor) -> Tensor:
        """(out,) values, shaped to broadcast against outputs."""
        raise NotImplementedError

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
        down, up = branch.pair()
        weight = torch.addmm(self.base.weight, up, down, alpha=branch.gain)
        return F.linear(inputs, weight, self.base.bias)

    def _learner(self) -> LoraBranch | None:
        """The layer's one branch, if it is better added to the weight: small, in float32, and learning."""
        if len(self.branches) != 1 or self.base.weight.numel() > _SMALL_WEIGHT or not torch.is_grad_enabled():
            return None
        (branch,) = self.branches.values()
        suits = branch.trainable and self.base.weight.dtype == branch.up.dtype and branch.magnitude is None
        return branch if suits and not branch.drops_inputs() and branch.acts() else None

    def changed(self, output: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
        """`output` (..., out) plus the branch's change for `inputs` (..., in), in the dtype of `output`."""
        inputs = branch.kept_inputs(inputs)
        if isinstance(branch, LokrBranch) or output.dtype != branch.down.dtype:  # sum in float32, round once
            return (output.float() + branch.gain * branch.product(self, inputs)).to(output.dtype)
        down, up = branch.pair()
        rows, changes = output.reshape(-1, output.shape[-1]), F.linear(inputs, down).reshape(-1, len(down))
        return torch.addmm(rows, changes, up.t(), alpha=branch.gain).view(output.shape)

    def product(self, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """(..., in) by `down` (rank, in) and `up` (out, rank) -> (..., out)."""
        return F.linear(F.linear(inputs.to(down.dtype), down), up)

    def by_output(self, values: Tensor) -> Tensor:
        """See `InjectedLayer`."""
        return values


class LoraInjectedConv2d(InjectedLayer):
    """A convolution with branches: `down` has its kernel, stride, padding, dilation and groups, `up` is 1 x 1."""

    base: nn.Conv2d

    def changed(self, output: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
        """`output` (n, out, h, w) plus the branch's change for `inputs`, in the dtype of `output`."""
        change = branch.product(self, branch.kept_inputs(inputs))
        if output.dtype != change.dtype:
            return (output.float() + branch.gain * change).to(output.dtype)
        return torch.add(output, change, alpha=branch.gain)

    def product(self, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """(n, in, h, w) by `down` (rank, in / groups, kernel) and `up` (out, rank, 1, 1) -> (n, out, h', w')."""
        groups = self.base.groups
        down = down.repeat(groups, 1, 1, 1) if groups > 1 else down
        hidden = self.base._conv_forward(inputs.to(down.dtype), down, None)  # knows every padding mode
        return F.conv2d(hidden, up, groups=groups)

    def by_output(self, values: Tensor) -> Tensor:
        """See `InjectedLayer`."""
        return values[:, None, None]
