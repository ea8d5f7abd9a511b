"""Weights of a blend in closed form: each layer should say on a concept's inputs what the concept's adapter says alone.

Where d_i(x) is adapter i's change of a layer's output at input x, minimise over the weights s

    sum over concepts j and inputs x of concept j:  || sum_i s_i d_i(x) - w_j d_j(x) ||²

whose normal equations need the inner products of the changes alone. It is gradient fusion (Gu et al. 2023,
arXiv:2305.18292, eq. 4) with a weight an adapter in place of a whole matrix, so that the result stays low-rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_pipeline.injection.inject import injected_layers
from lora_pipeline.injection.layers import InjectedLayer

Group = Callable[[str], Hashable]


class Products:
    """Inner products of the adapters' changes, summed by groups of layers.

    Args:
        names: The adapters, in the order of rows and columns.
        group: The group of a target.
    """

    def __init__(self, names: Sequence[str], group: Group) -> None:
        self.names = list(names)
        self._group = group
        size = len(self.names)
        # by group: (concepts, adapters, adapters), the products on the inputs of each concept
        self.by_group: dict[Hashable, Tensor] = defaultdict(lambda: torch.zeros(size, size, size, dtype=torch.float64))

    @contextmanager
    def watching(self, model: nn.Module, concept: str) -> Iterator[None]:
        """Inside, what the model's injected layers are given counts as inputs of a concept."""
        index = self.names.index(concept)

        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, InjectedLayer)
            self.by_group[self._group(layer.target)][index] += self._of(layer, inputs[0])

        handles = [layer.register_forward_pre_hook(add) for layer in injected_layers(model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _of(self, layer: InjectedLayer, inputs: Tensor) -> Tensor:
        changes = torch.zeros(len(self.names), 1, dtype=torch.float32, device=inputs.device)
        for name, branch in layer.branches.items():
            change = layer.product(inputs, branch.down, branch.up) * (branch.alpha / branch.down.shape[0])
            if changes.shape[1] == 1:
                changes = changes.new_zeros(len(self.names), change.numel())
            changes[self.names.index(name)] = change.flatten()
        return (changes @ changes.T).double().cpu()


def solve(products: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """The weights that minimise the squared error, drawn towards the given ones.

    Args:
        products: (concepts, adapters, adapters), see `Products`.
        weights: (adapters,) float64: how strong each adapter is alone, which is also what it is drawn to.
        ridge: How strongly, as a share of each adapter's own energy; at least 0. What nothing decides (an adapter
            that changes nothing here) stays at its given weight.

    Returns:
        (adapters,) float64.
    """
    left = products.sum(dim=0)
    right = torch.stack([products[j, :, j] * weights[j] for j in range(len(weights))]).sum(dim=0)
    own = left.diagonal()
    towards = torch.where(own > 0, ridge * own, torch.ones_like(own))
    # least squares, as without a ridge an adapter given twice leaves the system singular
    system = (left + towards.diag(), (right + towards * weights)[:, None])
    solution: Tensor = torch.linalg.lstsq(*system, driver="gelsd").solution
    return solution.flatten()


def solved(products: Products, weights: Mapping[str, float], ridge: float) -> dict[Hashable, dict[str, float]]:
    """`solve` for each group: weights by adapter."""
    given = torch.tensor([weights[name] for name in products.names], dtype=torch.float64)
    return {
        group: dict(zip(products.names, solve(each, given, ridge).tolist(), strict=True))
        for group, each in products.by_group.items()
    }
