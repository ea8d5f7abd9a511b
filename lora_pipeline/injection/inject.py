"""Adapters into a live model, out of it, and folded into its weights.

`prefix` is one of `targets.MODELS`; targets are full target names (see `adapters.targets`), whether or not the live
text encoder has a `text_model` level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lora_pipeline.adapters.adapter import Adapter, check_family, check_known
from lora_pipeline.adapters.dora import approximated, dora_change
from lora_pipeline.adapters.lora import LoraFactors, fitted
from lora_pipeline.adapters.targets import UNET, root, target_of
from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.injection.branches import LoraBranch
from lora_pipeline.injection.chance import Chance
from lora_pipeline.injection.kinds import Make, Place, check_rank, lora
from lora_pipeline.injection.layers import InjectedLayer, LoraInjectedConv2d, LoraInjectedLinear

Weights = Mapping[str, float] | Callable[[str, str], float]


def select_targets(model: nn.Module, prefix: str, globs: Sequence[str]) -> list[str]:
    """The linear layers and convolutions whose path matches a glob.

    Args:
        model: A UNet or a text encoder.
        prefix: One of `targets.MODELS`.
        globs: Over module paths below `targets.root(prefix)`; `*` crosses dots.

    Returns:
        Target names, in the model's order.

    Raises:
        ParamsError: A glob that matches nothing.
    """
    targets = list(_layers(model, prefix))
    start = len(root(prefix))
    for glob in globs:
        if not any(fnmatchcase(target[start:], glob) for target in targets):
            example = targets[len(targets) // 2][start:] if targets else "none"
            key = "adapter.unet_targets" if prefix == UNET else "adapter.text_encoder_targets"
            raise ParamsError(key, f"{glob!r} matches no layer", f"use names like {example!r}")
    return [target for target in targets if any(fnmatchcase(target[start:], glob) for glob in globs)]


def inject_new(  # noqa: PLR0913 - what the branches are, and what they start from
    model: nn.Module,
    prefix: str,
    targets: Sequence[str],
    name: str,
    *,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
    generator: torch.Generator,
    make: Make | None = None,
    chance: Chance | None = None,
) -> None:
    """Adds trainable branches that change nothing yet.

    Args:
        model: A UNet or a text encoder.
        prefix: One of `targets.MODELS`.
        targets: See `select_targets`.
        name: The branches'.
        rank: Of all targets, or by target.
        alpha: The same.
        generator: Decides what they start from.
        make: Of which kind they are; None for a LoRA that starts as in the paper's code.
        chance: What they leave out while they learn.

    Raises:
        ParamsError: The rank is below 1 or above what a layer can have.
    """
    _refuse_taken_name(model, name)
    layers = _layers(model, prefix)
    ranks = {target: rank if isinstance(rank, int) else rank[target] for target in targets}
    for target in targets:
        check_rank(target, ranks[target], _base(model, layers[target]).weight.shape)
    for target in targets:
        weight = _base(model, layers[target]).weight.requires_grad_(False)
        own = alpha if isinstance(alpha, int | float) else alpha[target]
        branch = (make or lora())(Place(target, weight, ranks[target], float(own), generator)).to(weight.device)
        branch.chance, branch.target = chance, target
        _add_branch(model, layers[target], target, name, branch)


def inject_adapter(model: nn.Module, prefix: str, adapter: Adapter, name: str) -> None:
    """Adds an adapter's branches for this model, frozen; its factors for other models are passed over.

    Raises:
        CorruptError: A target the model does not have, or factors of another shape. The model is unchanged then.
    """
    check_known(name, adapter)
    _refuse_taken_name(model, name)
    layers = _layers(model, prefix)
    check_family(name, adapter, {target: tuple(_base(model, path).weight.shape) for target, path in layers.items()})
    mine = {}
    for target, factors in adapter.factors.items():
        if not target.startswith(root(prefix)):
            continue
        if target not in layers:
            raise CorruptError(target, "is no layer of this base", "use the base this adapter was trained on")
        weight = _base(model, layers[target]).weight
        mine[target] = _frozen(target, weight, factors, adapter.magnitudes.get(target)).to(weight.device)
    for target, branch in mine.items():
        _add_branch(model, layers[target], target, name, branch)


def _frozen(target: str, weight: Tensor, factors: LoraFactors, magnitude: Tensor | None) -> LoraBranch:
    """A branch for a weight; with a magnitude by column its change is the full one, which is of these inputs alone."""
    fitting = fitted(target, factors, tuple(weight.shape))
    if magnitude is None:
        return LoraBranch(fitting, trainable=False)
    if magnitude.shape[0] == magnitude.numel() == len(weight):
        return LoraBranch(fitting, trainable=False, magnitude=magnitude.reshape(-1, *[1] * (weight.ndim - 1)))
    change = dora_change(target, weight.detach().cpu(), fitting, magnitude)
    return LoraBranch(approximated(change, None)[0], trainable=False)


def set_weights(model: nn.Module, weights: Weights) -> None:
    """Sets the branches' run-time multipliers.

    Args:
        model: A model with injected layers.
        weights: By adapter name (adapters it does not name keep theirs), or a function of target and adapter name.
    """
    for layer in injected_layers(model):
        for name, branch in layer.branches.items():
            branch.weight = weights(layer.target, name) if callable(weights) else weights.get(name, branch.weight)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by `<target>.<adapter name>.<side>`: `down` and `up`, and what else the kind has."""
    return {
        f"{layer.target}.{name}.{side}": parameter
        for layer in injected_layers(model)
        for name, branch in layer.branches.items()
        for side, parameter in branch.named_parameters()
        if parameter.requires_grad
    }


def collect(model: nn.Module, prefix: str, name: str) -> dict[str, LoraFactors]:
    """Copies of one adapter's factors by target; run-time weights are not part of them."""
    return {
        layer.target: layer.branches[name].factors()
        for layer in injected_layers(model)
        if layer.target.startswith(root(prefix)) and name in layer.branches
    }


def collect_magnitudes(model: nn.Module, prefix: str, name: str) -> dict[str, Tensor]:
    """Copies of one adapter's DoRA magnitudes by target."""
    return {
        layer.target: branch.magnitude.detach().clone().cpu()
        for layer in injected_layers(model)
        if layer.target.startswith(root(prefix)) and (branch := layer.branches.get(name)) is not None
        if branch.magnitude is not None
    }


def hold(model: nn.Module, name: str, most: float) -> None:
    """Shortens the factors of one adapter's changes that are longer than `most`, see `LoraBranch.hold`."""
    for layer in injected_layers(model):
        if name in layer.branches:
            layer.branches[name].hold(most)


@torch.no_grad()
def plain(layer: InjectedLayer, branch: LoraBranch) -> LoraFactors:
    """A branch's change at weight 1 as a LoRA: of full rank for a DoRA."""
    factors = branch.factors()
    if branch.magnitude is None:
        return factors
    return approximated(dora_change(layer.target, layer.base.weight, factors, branch.magnitude), None)[0]


def collapse(model: nn.Module) -> None:
    """Folds all branches, at their weights, into the base weights, and takes them away.

    The sum is made in float32 and rounded once to the layer's dtype.
    """
    for layer in list(injected_layers(model)):
        weight = layer.base.weight
        change = torch.zeros(weight.shape, device=weight.device)
        for branch in layer.branches.values():
            change += plain(layer, branch).scaled(branch.weight).delta()
        with torch.no_grad():
            weight.copy_(weight.float() + change)
    remove(model)


def remove(model: nn.Module) -> None:
    """Puts the original layers back: the same objects, untouched."""
    for path, module in list(model.named_modules()):
        if isinstance(module, InjectedLayer):
            model.set_submodule(path, module.base)


def injected_layers(model: nn.Module) -> Iterator[InjectedLayer]:
    """The injected layers, in the model's order."""
    return (module for module in model.modules() if isinstance(module, InjectedLayer))


def _layers(model: nn.Module, prefix: str) -> dict[str, str]:
    """The module path of every layer that can take a branch, or has one, by target name."""
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, InjectedLayer))
    return {
        target_of(prefix, path): path
        for path, module in model.named_modules()
        if isinstance(module, InjectedLayer | nn.Linear | nn.Conv2d) and not path.startswith(inside)
    }


def _base(model: nn.Module, path: str) -> nn.Linear | nn.Conv2d:
    module = model.get_submodule(path)
    base = module.base if isinstance(module, InjectedLayer) else module
    assert isinstance(base, nn.Linear | nn.Conv2d)
    return base


def _add_branch(model: nn.Module, path: str, target: str, name: str, branch: LoraBranch) -> None:
    layer = model.get_submodule(path)
    if not isinstance(layer, InjectedLayer):
        base = _base(model, path)
        kind = LoraInjectedLinear if isinstance(base, nn.Linear) else LoraInjectedConv2d
        layer = kind(base, target).train(base.training)
        model.set_submodule(path, layer)
    layer.add_branch(name, branch)


def _refuse_taken_name(model: nn.Module, name: str) -> None:
    if any(name in layer.branches for layer in injected_layers(model)):
        raise ParamsError(name, "is injected already", "give each adapter its own name")
