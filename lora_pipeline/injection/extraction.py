"""What injected layers have learnt, taken out of a live model or folded into it, under the names of cloneofsimo's lora.

There the scale is lost on the way; here it is part of the result.
"""

from __future__ import annotations

from torch import Tensor, nn

from lora_pipeline.adapters.lora import concatenated
from lora_pipeline.errors import UsageError
from lora_pipeline.injection.inject import collapse, injected_layers, plain


def extract_lora_ups_down(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The factors of every injected layer, in the model's order, to be multiplied without any further number.

    Args:
        model: A model with injected layers.

    Returns:
        (up, down) each, float32 copies: (out, rank) and (rank, in / groups) of a linear layer, (out, rank, 1, 1) and
        (rank, in / groups, height, width) of a convolution. Their product is what the layer adds to its weight at this
        moment: weight · alpha / rank is multiplied into up, and several adapters of a layer stand side by side.

    Raises:
        UsageError: No layer is injected.
    """
    pairs = []
    for layer in injected_layers(model):
        factors = concatenated([(plain(layer, branch), branch.weight) for branch in layer.branches.values()])
        pairs.append((factors.up * factors.scale, factors.down))
    if not pairs:
        raise UsageError("model", "has no injected layers", "inject an adapter first")
    return pairs


def collapse_lora(model: nn.Module, alpha: float = 1.0) -> None:
    """Folds what all injected layers add into their base weights, and puts the plain layers back.

    Args:
        model: A model with injected layers, of whatever kind and wherever they are.
        alpha: Multiplies the change, beside the layers' own weight and scale.
    """
    for layer in injected_layers(model):
        for branch in layer.branches.values():
            branch.weight *= alpha
    collapse(model)
