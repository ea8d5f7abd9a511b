"""What one adapter adds to one layer, in every kind: a product of parameters that are float32 and may learn."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from lora_pipeline.adapters.lora import LoraFactors, times_identity
from lora_pipeline.adapters.products import hadamard, kronecker
from lora_pipeline.injection.chance import Chance


class Layer(Protocol):
    """What a branch needs of its layer."""

    def product(self, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up(down(inputs))."""
        ...


class LoraBranch(nn.Module):
    """One adapter's factors in one layer.

    Args:
        factors: What they start from.
        trainable: Whether they learn.
        magnitude: (out, 1[, 1, 1]): with it the branch is a DoRA, see `Adapter.magnitudes`.

    Attributes:
        down, up: float32 parameters, see `LoraFactors`.
        alpha: The change is multiplied by alpha / rank.
        weight: A multiplier that may be set at any time; 0 switches the branch off at no cost.
        chance: What is left out while it learns.
        target: The layer's name, which decides what is.
    """

    magnitude: nn.Parameter | None

    def __init__(self, factors: LoraFactors, trainable: bool, magnitude: Tensor | None = None) -> None:
        super().__init__()
        self.trainable = trainable
        self.down = self.learnt(factors.down)
        self.up = self.learnt(factors.up)
        self.magnitude = None if magnitude is None else self.learnt(magnitude)
        self.alpha = factors.alpha
        self.weight = 1.0
        self.chance: Chance | None = None
        self.target = ""

    def learnt(self, value: Tensor) -> nn.Parameter:
        """A parameter of its own that starts as `value`."""
        return nn.Parameter(value.detach().float().clone(), requires_grad=self.trainable)

    @property
    def scale(self) -> float:
        """What the product is multiplied by at weight 1: alpha / rank."""
        return self.alpha / self.down.shape[0]

    @property
    def gain(self) -> float:
        """What the product is multiplied by at this moment: weight * alpha / rank."""
        return self.weight * self.scale

    def acts(self) -> bool:
        """Whether it adds anything at this moment."""
        if self.weight == 0.0:
            return False
        chance = self.chance
        return chance is None or not chance.drops(chance.branches) or not chance.skips(self.target)

    def pair(self) -> tuple[Tensor, Tensor]:
        """`down` and `up` whose product, times `gain`, is the change: (ranks, in[, h, w]) and (out, ranks[, 1, 1])."""
        return self.kept_ranks(), self.up

    def product(self, layer: Layer, inputs: Tensor) -> Tensor:
        """The change's product with a layer's inputs, without `gain`."""
        return layer.product(inputs, *self.pair())

    def kept_ranks(self) -> Tensor:
        """`down`, without the ranks that are left out at this moment."""
        chance = self.chance
        if chance is None or not chance.drops(chance.ranks):
            return self.down
        ones = self.down.detach().new_ones(len(self.down), *[1] * (self.down.ndim - 1))
        kept: Tensor = chance.kept(chance.ranks, f"ranks {self.target}", ones)
        return self.down * kept

    def drops_inputs(self) -> bool:
        """Whether `kept_inputs` leaves some out at this moment."""
        return self.chance is not None and self.chance.drops(self.chance.inputs)

    def kept_inputs(self, inputs: Tensor) -> Tensor:
        """Inputs without those that are left out at this moment."""
        if self.chance is None or not self.drops_inputs():
            return inputs
        kept: Tensor = self.chance.kept(self.chance.inputs, f"inputs {self.target}", inputs.detach())
        return inputs * kept

    @torch.no_grad()
    def factors(self) -> LoraFactors:
        """A copy of the change as a LoRA; weight, chance and magnitude are not part of it."""
        down, up = self.pair()
        return LoraFactors(down.detach().clone(), up.detach().clone(), self.scale * down.shape[0])

    @torch.no_grad()
    def hold(self, most: float) -> None:
        """Shortens the factors, both alike, where the change at weight 1 is longer than `most`.

        Its length is the Frobenius norm, ‖up · down‖² = tr((upᵀ up)(down downᵀ)), which needs no full matrix.
        """
        down, up = (each.flatten(1) for each in self.pair())
        length = self.scale * ((up.T @ up) * (down @ down.T)).sum().clamp_min(0.0).sqrt()
        root = (most / length.clamp_min(1e-12)).clamp_max(1.0).sqrt()
        self.down.mul_(root)
        self.up.mul_(root)


class PissaBranch(LoraBranch):
    """A LoRA that starts from the largest parts of the layer's weight, which is thought to be without them.

    Meng et al. 2024, arXiv:2404.02948. The layer stays as it is: what the factors started from is taken off again, so
    that the change is a LoRA of twice the rank to the layer as it was.
    """

    start_down: Tensor
    start_up: Tensor

    def __init__(self, factors: LoraFactors) -> None:
        super().__init__(factors, trainable=True)
        self.register_buffer("start_down", self.down.detach().clone())
        self.register_buffer("start_up", -self.up.detach())

    def pair(self) -> tuple[Tensor, Tensor]:
        """See `LoraBranch.pair`."""
        return torch.cat([self.down, self.start_down]), torch.cat([self.up, self.start_up], dim=1)


class LohaBranch(LoraBranch):
    """A Hadamard product, (other_up · other_down) ∘ (up · down) (Hyeon-Woo et al. 2021, arXiv:2108.06098).

    Args:
        factors: up and down.
        others: other_up and other_down, of the same shapes.
    """

    def __init__(self, factors: LoraFactors, others: LoraFactors) -> None:
        super().__init__(factors, trainable=True)
        self.other_down = self.learnt(others.down)
        self.other_up = self.learnt(others.up)

    def pair(self) -> tuple[Tensor, Tensor]:
        """See `LoraBranch.pair`; of rank² ranks."""
        up, down = hadamard(
            (self.other_up.flatten(1), self.other_down.flatten(1)), (self.up.flatten(1), self.kept_ranks().flatten(1))
        )
        return down.reshape(-1, *self.down.shape[1:]), up.reshape(*up.shape, *self.up.shape[2:])


class LokrBranch(LoraBranch):
    """A Kronecker product, left ⊗ (up · down) (Yeh et al. 2023, arXiv:2309.14859, section 3).

    Args:
        factors: up (out / rows, rank), and down (rank, in / columns[, height, width]).
        left: (rows, columns).
    """

    def __init__(self, factors: LoraFactors, left: Tensor) -> None:
        super().__init__(factors, trainable=True)
        self.left = self.learnt(left)

    def pair(self) -> tuple[Tensor, Tensor]:
        """See `LoraBranch.pair`; of rank times the shorter side of `left` ranks."""
        kernel = self.down.shape[2:]
        up, down = kronecker(times_identity(self.left), (self.up.flatten(1), self.kept_ranks().flatten(1)))
        columns = self.left.shape[1] * self.down.shape[1]
        return down.reshape(-1, columns, *kernel), up.reshape(*up.shape, *self.up.shape[2:])

    def product(self, layer: Layer, inputs: Tensor) -> Tensor:
        """See `LoraBranch.product`: the right block over every slice of the inputs, and `left` over the slices.

        A slice of a linear layer is of the last axis, of a convolution of the channels.
        """
        columns = self.left.shape[1]
        down = self.kept_ranks()
        if self.down.ndim == 2:
            inner = layer.product(inputs.unflatten(-1, (columns, -1)), down, self.up)
            return torch.einsum("ij,...jk->...ik", self.left, inner).flatten(-2)
        inner = layer.product(inputs.unflatten(1, (columns, -1)).flatten(0, 1), down, self.up)
        inner = inner.unflatten(0, (-1, columns))
        return torch.einsum("ij,njkhw->nikhw", self.left, inner).flatten(1, 2)
