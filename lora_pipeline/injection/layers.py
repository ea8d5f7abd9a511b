"""A frozen layer with low-rank branches beside it: y = W x + Σ weight · (alpha / rank) · up(down(x)).

Hu et al. 2021, arXiv:2106.09685. The frozen layer is wrapped, never copied or changed, so that taking the wrapper away
restores the model bit for bit. Factors are float32 whatever the layer's dtype.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from lora_pipeline.adapters.lora import LoraFactors

InjectedLayer: TypeAlias = "LoraInjectedLinear | LoraInjectedConv2d"


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
        return self.weight * self.alpha / self.down.shape[0]

    def factors(self) -> LoraFactors:
        """A copy of the factors; `weight` is a matter of the moment and not part of them."""
        return LoraFactors(self.down.detach().clone(), self.up.detach().clone(), self.alpha)


class LoraInjectedLinear(nn.Module):
    """A linear layer with branches.

    Args:
        base: The layer, which stays what it is.
        target: Its target name.
    """

    def __init__(self, base: nn.Linear, target: str) -> None:
        super().__init__()
        self.base = base
        self.target = target
        self.names: list[str] = []
        self.stack = nn.ModuleList()

    @property
    def branches(self) -> dict[str, LoraBranch]:
        return branches(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the base layer's dtype."""
        output: Tensor = self.base(inputs)
        for branch in self.stack:
            if branch.weight != 0.0:
                output = _add_linear(output, inputs, branch)  # type: ignore[arg-type]  # a ModuleList is untyped
        return output


class LoraInjectedConv2d(nn.Module):
    """A convolution with branches: `down` has its kernel, stride, padding, dilation and groups, `up` is 1 x 1.

    Args:
        base: The layer, which stays what it is.
        target: Its target name.
    """

    def __init__(self, base: nn.Conv2d, target: str) -> None:
        super().__init__()
        self.base = base
        self.target = target
        self.names: list[str] = []
        self.stack = nn.ModuleList()

    @property
    def branches(self) -> dict[str, LoraBranch]:
        return branches(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height', width'), in the base layer's dtype."""
        output: Tensor = self.base(inputs)
        for branch in self.stack:
            if branch.weight != 0.0:
                output = _add_conv(self.base, output, inputs, branch)  # type: ignore[arg-type]  # as above
        return output


def branches(layer: InjectedLayer) -> dict[str, LoraBranch]:
    """A layer's branches by adapter name, in order of injection."""
    return dict(zip(layer.names, layer.stack, strict=True))  # type: ignore[arg-type]  # a ModuleList is untyped


def _add_linear(output: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
    hidden = F.linear(inputs.to(branch.down.dtype), branch.down)
    if output.dtype != hidden.dtype:  # sum in float32, round once
        return (output.float() + branch.gain * F.linear(hidden, branch.up)).to(output.dtype)
    rows = output.reshape(-1, output.shape[-1])
    return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), branch.up.t(), alpha=branch.gain).view(output.shape)


def _add_conv(base: nn.Conv2d, output: Tensor, inputs: Tensor, branch: LoraBranch) -> Tensor:
    down = branch.down.repeat(base.groups, 1, 1, 1) if base.groups > 1 else branch.down
    hidden = base._conv_forward(inputs.to(down.dtype), down, None)  # knows every padding mode
    change = F.conv2d(hidden, branch.up, groups=base.groups)
    if output.dtype != change.dtype:
        return (output.float() + branch.gain * change).to(output.dtype)
    return torch.add(output, change, alpha=branch.gain)
