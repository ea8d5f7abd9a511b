"""Weights of a blend in closed form: each layer should say to some adapters' prompts what they say without the others.

Where d_i(x) is adapter i's change of a layer's output at input x, minimise over the weights s

    sum over scenes J and inputs x of their prompts:  || sum_i s_i d_i(x) - sum_{j in J} w_j d_j(x) ||²

whose normal equations need the inner products of the changes alone. It is gradient fusion (Gu et al. 2023,
arXiv:2305.18292, eq. 4) with a weight an adapter in place of a whole matrix, so that the result stays low-rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_pipeline.injection.inject import injected_layers
from lora_pipeline.injection.layers import InjectedLayer

Group = Callable[[str], Hashable]


class Products:
    """Inner products of the adapters' changes, summed by groups of layers: both sides of the normal equations.

    Args:
        weights: Of the adapters, in the order of rows and columns.
        group: The group of a target.
    """

    def __init__(self, weights: Mapping[str, float], group: Group) -> None:
        self.names = list(weights)
        self.weights = torch.tensor(list(weights.values()), dtype=torch.float64)
        self._group = group
        size = len(self.names)
        # by group: (adapters, adapters), and with the changes that are wanted, (adapters,)
        self.left: dict[Hashable, Tensor] = defaultdict(lambda: torch.zeros(size, size, dtype=torch.float64))
        self.right: dict[Hashable, Tensor] = defaultdict(lambda: torch.zeros(size, dtype=torch.float64))

    @contextmanager
    def watching(self, model: nn.Module, adapters: Collection[str]) -> Iterator[None]:
        """Inside, what the model's injected layers are given counts as inputs of a scene with these adapters."""
        wanted = self.weights * torch.tensor([name in adapters for name in self.names])

        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, InjectedLayer)
            products, group = self._of(layer, inputs[0]), self._group(layer.target)
            self.left[group] += products
            self.right[group] += products @ wanted

        handles = [layer.register_forward_pre_hook(add) for layer in injected_layers(model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def solved(self, ridge: float) -> dict[Hashable, dict[str, float]]:
        """`solve` for each group: weights by adapter."""
        return {
            group: dict(zip(self.names, solve(left, self.right[group], self.weights, ridge).tolist(), strict=True))
            for group, left in self.left.items()
        }

    def _of(self, layer: InjectedLayer, inputs: Tensor) -> Tensor:
        changes = torch.zeros(len(self.names), 1, dtype=torch.float32, device=inputs.device)
        for name, branch in layer.branches.items():
            change = layer.product(inputs, branch.down, branch.up) * (branch.alpha / branch.down.shape[0])
            if changes.shape[1] == 1:
                changes = changes.new_zeros(len(self.names), change.numel())
            changes[self.names.index(name)] = change.flatten()
        return (changes @ changes.T).double().cpu()


def solve(left: Tensor, right: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """The weights that minimise the squared error, drawn towards the given ones.

    Args:
        left: (adapters, adapters) float64, see `Products`.
        right: (adapters,) float64.
        weights: (adapters,) float64: what they are drawn to.
        ridge: How strongly, as a share of each adapter's own energy; at least 0. What nothing decides (an adapter
            that changes nothing here) stays at its given weight.

    Returns:
        (adapters,) float64.
    """
    own = left.diagonal()
    towards = torch.where(own > 0, ridge * own, torch.ones_like(own))
    # least squares, as without a ridge an adapter given twice leaves the system singular
    system = (left + towards.diag(), (right + towards * weights)[:, None])
    solution: Tensor = torch.linalg.lstsq(*system, driver="gelsd").solution
    return solution.flatten()
