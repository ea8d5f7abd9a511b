"""Blends whose weights are learnt from what each adapter does alone, with the base frozen and no pictures needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Json
from lora_pipeline.adapters.blocks import block_of
from lora_pipeline.adapters.composition import Composition, Part, blend, digest
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.recipes import Recipe
from lora_pipeline.adapters.targets import UNET, root
from lora_pipeline.errors import ParamsError
from lora_pipeline.injection.inject import set_weights
from lora_pipeline.pretrained.components import Components
from lora_pipeline.training.distillation import Gates, Report, column_gates, distil, group_gates
from lora_pipeline.training.least_squares import Products, solved
from lora_pipeline.training.trajectories import Moment, attached, trajectory

Granularity = Literal["adapter", "block", "column"]
EVERYWHERE = "everywhere"


@dataclass(frozen=True)
class Fit:
    """What is learnt, and from what.

    Args:
        method: `least_squares`, in closed form, or `distill`, by gradient descent.
        granularity: A weight for each `adapter`, for each `block` of each adapter, or (`distill` alone) for each input
            `column` of each of its layers.
        prompts: What each adapter is for, by its name.
        draws: Trajectories of each adapter; the prompts take turns.
        steps: Of the optimiser; `least_squares` has none.
        learning_rate: Of the weights, which are around 1.
        regularisation: `least_squares`: how strongly weights are drawn to the given ones, as a share of each
            adapter's energy. `distill` with columns: weight of the overlap between adapters.
        seed: Decides the noise and the order.
    """

    method: Literal["least_squares", "distill"]
    granularity: Granularity
    prompts: Mapping[str, Sequence[str]]
    draws: int
    steps: int
    learning_rate: float
    regularisation: float
    seed: int

    def document(self) -> dict[str, Json]:
        """What provenance says about it."""
        prompts: dict[str, Json] = {name: list(each) for name, each in self.prompts.items()}
        numbers: dict[str, Json] = {"draws": self.draws, "regularisation": self.regularisation, "seed": self.seed}
        if self.method == "distill":
            numbers |= {"learning_rate": self.learning_rate, "steps": self.steps}
        return {"granularity": self.granularity, "method": self.method, "prompts": prompts, **numbers}


@dataclass(frozen=True, eq=False)
class LearntBlend:
    """A blend, the weights that were learnt, and how.

    Args:
        composition: The blend.
        weights: By adapter and group (`everywhere`, a block); of columns their means by block.
        losses: Of every step of `distill`.
    """

    composition: Composition
    weights: Mapping[str, Mapping[str, float]]
    losses: Sequence[float] = field(default_factory=tuple)


def learnt_blend(
    components: Components, parts: Sequence[Part], recipe: Recipe, fit: Fit, report: Report
) -> LearntBlend:
    """Adapters as one, at weights of the UNet under which each still does on its own prompts what it does alone.

    Text encoders keep the given weights.

    Args:
        components: The base; it comes back as it was.
        parts: (name, adapter, weight): a weight is how strong the adapter should be, and where its learning starts.
        recipe: A sum, with what else is asked for: weights of the text encoder, a rank, renamed tokens.
        fit: How.
        report: Is told the optimiser's steps done and the loss.

    Raises:
        ParamsError: Prompts that do not name each adapter, a recipe that fixes what is to be learnt, or an adapter
            without layers in the UNet.
        CorruptError: See `inject_adapter` and `blend`.
    """
    _check(parts, recipe, fit)
    weights = {name: weight for name, _, weight in parts}
    text_weights = {name: recipe.text_encoder_weights.get(name, weight) for name, weight in weights.items()}
    learn = _least_squares if fit.method == "least_squares" else _distilled
    with attached(components, parts, recipe.rename_tokens) as mine:
        gates, losses = learn(mine, weights, text_weights, fit, report)
    return _folded(parts, replace(recipe, text_encoder_weights=text_weights), fit, gates, losses)


Learnt = Mapping[tuple[str, Hashable], Tensor]


def _least_squares(
    mine: Components, weights: Mapping[str, float], text_weights: Mapping[str, float], fit: Fit, _report: Report
) -> tuple[Learnt, list[float]]:
    products = Products(list(weights), _group(fit.granularity))
    for concept in weights:
        with products.watching(mine.unet, concept):
            for _ in _moments(mine, weights, text_weights, concept, fit):
                pass
    found = solved(products, weights, fit.regularisation)
    return {(name, group): torch.tensor(each[name]) for group, each in found.items() for name in each}, []


def _distilled(
    mine: Components, weights: Mapping[str, float], text_weights: Mapping[str, float], fit: Fit, report: Report
) -> tuple[Learnt, list[float]]:
    moments = [moment for concept in weights for moment in _moments(mine, weights, text_weights, concept, fit)]
    set_weights(mine.text_encoder, text_weights)
    group = _group(fit.granularity)
    columns = fit.granularity == "column"
    gates: Gates = column_gates(mine.unet, weights) if columns else group_gates(mine.unet, weights, group)
    losses = distil(
        mine,
        moments,
        gates,
        group,
        steps=fit.steps,
        learning_rate=fit.learning_rate,
        overlap=fit.regularisation if columns else 0.0,
        seed=fit.seed,
        report=report,
    )
    return {key: gate.detach().clone() for key, gate in gates.items()}, losses


def _moments(
    mine: Components, weights: Mapping[str, float], text_weights: Mapping[str, float], concept: str, fit: Fit
) -> list[Moment]:
    prompts = fit.prompts[concept]
    drawn = tuple(prompts[index % len(prompts)] for index in range(fit.draws))
    return list(trajectory(mine, weights, text_weights, concept, drawn, fit.seed))


def _group(granularity: Granularity) -> Callable[[str], Hashable]:
    if granularity == "adapter":
        return lambda _: EVERYWHERE
    return block_of if granularity == "block" else lambda target: target


def _folded(parts: Sequence[Part], recipe: Recipe, fit: Fit, learnt: Learnt, losses: list[float]) -> LearntBlend:
    """The blend at the learnt weights: exactly, as every weight multiplies factors."""
    told = _told(learnt)
    if fit.granularity == "column":
        gated = [
            (name, replace(adapter, factors=_gated(name, adapter.factors, learnt)), 1.0) for name, adapter, _ in parts
        ]
        composition = blend(gated, recipe)
    elif fit.granularity == "block":
        composition = blend([(name, adapter, 1.0) for name, adapter, _ in parts], replace(recipe, block_weights=told))
    else:
        composition = blend(
            [(name, adapter, told[name].get(EVERYWHERE, weight)) for name, adapter, weight in parts], recipe
        )
    made: Sequence[Json] = composition.adapter.provenance["parents"]  # type: ignore[assignment]
    parents: list[Json] = [
        {**parent, "sha256": digest(adapter)}  # type: ignore[dict-item]
        for parent, (_, adapter, _) in zip(made, parts, strict=True)
    ]
    fitted: dict[str, Json] = {**fit.document(), "weights": told}
    provenance = {**composition.adapter.provenance, "fit": fitted, "parents": parents}
    adapter = replace(composition.adapter, provenance=provenance)
    return LearntBlend(replace(composition, adapter=adapter), told, tuple(losses))


def _gated(name: str, factors: Mapping[str, LoraFactors], learnt: Learnt) -> dict[str, LoraFactors]:
    def column(target: str, each: LoraFactors) -> LoraFactors:
        if not target.startswith(root(UNET)):
            return each
        gate = learnt[name, target].reshape(-1, *[1] * (each.down.ndim - 2))
        return replace(each, down=each.down.float() * gate)

    return {target: column(target, each) for target, each in factors.items()}


def _told(learnt: Learnt) -> dict[str, dict[str, float]]:
    """Weights by adapter and group; of columns the means of each block's."""
    gathered: dict[str, dict[str, list[Tensor]]] = {}
    for (name, group), weight in learnt.items():
        place = block_of(str(group)) if weight.ndim else str(group)
        gathered.setdefault(name, {}).setdefault(place, []).append(weight.flatten())
    return {
        name: {place: float(torch.cat(each).double().mean()) for place, each in sorted(places.items())}
        for name, places in sorted(gathered.items())
    }


def _check(parts: Sequence[Part], recipe: Recipe, fit: Fit) -> None:
    names = [name for name, _, _ in parts]
    if len(set(names)) != len(names):
        raise ParamsError("weights", "two of the adapters have one name", "give each file a name of its own")
    if recipe.method != "sum" or recipe.block_weights:
        problem = f"fixes what {fit.method} learns: it is a sum without weights by block"
        raise ParamsError("block_weights" if recipe.block_weights else "method", problem, "leave it out")
    if set(fit.prompts) != set(names):
        odd = min(set(fit.prompts) ^ set(names))
        problem = f"has none for {odd!r}" if odd in names else f"has some for {odd!r}, which is no adapter here"
        raise ParamsError("prompts", problem, f"give prompts for {', '.join(names)}")
    if fit.granularity == "column" and fit.method != "distill":
        raise ParamsError("granularity", f"column is not for {fit.method}", "use adapter or block, or method distill")
    for name, adapter, _ in parts:
        if not any(target.startswith(root(UNET)) for target in adapter.factors):
            raise ParamsError(name, "changes nothing in the UNet, so that no weight could be learnt", "use method sum")
