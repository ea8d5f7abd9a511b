"""Blends whose weights are learnt from what each adapter does alone, with the base frozen and no pictures needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter, Json, check_understood
from lora_pipeline.adapters.blocks import block_of
from lora_pipeline.adapters.composition import Composition, Part, blend, digest
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.recipes import Recipe
from lora_pipeline.adapters.targets import UNET, root
from lora_pipeline.errors import ParamsError
from lora_pipeline.injection.inject import set_weights
from lora_pipeline.pretrained.components import Components
from lora_pipeline.training.distillation import column_gates, distil, group_gates
from lora_pipeline.training.fit import Fit, Scene
from lora_pipeline.training.least_squares import Products
from lora_pipeline.training.trajectories import Moment, attached, trajectory

EVERYWHERE = "everywhere"
Report = Callable[[int, float | None], None]


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
    """Adapters as one, at weights of the UNet under which prompts of some get what those do, each alone, and no more.

    Text encoders keep the given weights.

    Args:
        components: The base; it comes back as it was.
        parts: (name, adapter, weight): a weight is how strong the adapter should be, and where its learning starts.
        recipe: A sum, with what else is asked for: weights of the text encoder, a rank, renamed tokens.
        fit: How.
        report: Is told the steps done, of `fit.work()`, and the loss of those of the optimiser.

    Raises:
        ParamsError: Prompts that do not name each adapter, a recipe that fixes what is to be learnt, or an adapter
            without layers in the UNet.
        CorruptError: See `inject_adapter` and `blend`.
    """
    _check(parts, recipe, fit)
    weights = {name: weight for name, _, weight in parts}
    text_weights = {name: recipe.text_encoder_weights.get(name, weight) for name, weight in weights.items()}
    with attached(components, parts, recipe.rename_tokens) as mine:
        study = _Study(mine, weights, text_weights, fit, report)
        gates, losses = study.least_squares() if fit.method == "least_squares" else study.distilled()
    return _folded(parts, replace(recipe, text_encoder_weights=text_weights), fit, gates, losses)


Learnt = Mapping[tuple[str, Hashable], Tensor]


@dataclass(frozen=True, eq=False)
class _Study:
    """A base with all adapters, and what is to be learnt on it."""

    components: Components
    weights: Mapping[str, float]
    text_weights: Mapping[str, float]
    fit: Fit
    report: Report

    def least_squares(self) -> tuple[Learnt, list[float]]:
        products = Products(self.weights, _group(self.fit.granularity))
        done = 0
        for scene in self.fit.scenes(self.weights):
            with products.watching(self.components.unet, scene.adapters):
                for _ in self.moments(scene):
                    done += 1
                    self.report(done, None)
        found = products.solved(self.fit.regularisation)
        return {(name, group): torch.tensor(each[name]) for group, each in found.items() for name in each}, []

    def distilled(self) -> tuple[Learnt, list[float]]:
        moments = []
        for moment in (each for scene in self.fit.scenes(self.weights) for each in self.moments(scene)):
            moments.append(moment)
            self.report(len(moments), None)
        for _, encoder in self.components.readers.values():
            set_weights(encoder, self.text_weights)
        group, columns = _group(self.fit.granularity), self.fit.granularity == "column"
        unet = self.components.unet
        gates = column_gates(unet, self.weights) if columns else group_gates(unet, self.weights, group)
        losses = distil(
            self.components,
            moments,
            gates,
            group,
            steps=self.fit.steps,
            learning_rate=self.fit.learning_rate,
            overlap=self.fit.regularisation if columns else 0.0,
            seed=self.fit.seed,
            report=lambda step, loss: self.report(len(moments) + step, loss),
        )
        return {key: gate.detach().clone() for key, gate in gates.items()}, losses

    def moments(self, scene: Scene) -> Iterator[Moment]:
        prompts = tuple(scene.prompts[index % len(scene.prompts)] for index in range(self.fit.draws))
        return trajectory(self.components, self.weights, self.text_weights, scene, prompts, self.fit.seed)


def _group(granularity: str) -> Callable[[str], Hashable]:
    if granularity == "adapter":
        return lambda _: EVERYWHERE
    return block_of if granularity == "block" else lambda target: target


def _folded(parts: Sequence[Part], recipe: Recipe, fit: Fit, learnt: Learnt, losses: list[float]) -> LearntBlend:
    """The blend at the learnt weights: exactly, as every weight multiplies factors."""
    told = _told(learnt)
    alone = {name: 1.0 for name, _, _ in parts}
    if fit.granularity == "adapter":
        alone = {name: told[name][EVERYWHERE] for name in alone}
    elif fit.granularity == "block":
        recipe = replace(recipe, block_weights=told)
    columns = learnt if fit.granularity == "column" else None
    weighted = [(name, _gated(name, adapter, columns), alone[name]) for name, adapter, _ in parts]
    composition = blend(weighted, recipe)
    made: Sequence[Json] = composition.adapter.provenance["parents"]  # type: ignore[assignment]
    parents: list[Json] = [
        {**parent, "sha256": digest(adapter)}  # type: ignore[dict-item]
        for parent, (_, adapter, _) in zip(made, parts, strict=True)
    ]
    fitted: dict[str, Json] = {**fit.document(), "weights": told}
    provenance = {**composition.adapter.provenance, "fit": fitted, "parents": parents}
    adapter = replace(composition.adapter, provenance=provenance)
    return LearntBlend(replace(composition, adapter=adapter), told, tuple(losses))


def _gated(name: str, adapter: Adapter, columns: Learnt | None) -> Adapter:
    def column(target: str, factors: LoraFactors) -> LoraFactors:
        if columns is None or not target.startswith(root(UNET)):
            return factors
        gate = columns[name, target].reshape(-1, *[1] * (factors.down.ndim - 2))
        return replace(factors, down=factors.down.float() * gate)

    return replace(adapter, factors={target: column(target, each) for target, each in adapter.factors.items()})


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
    fit.scenes([name for name, _, _ in parts])
    if recipe.method != "sum" or recipe.block_weights:
        problem = f"fixes what {fit.method} learns: it is a sum without weights by block"
        raise ParamsError("block_weights" if recipe.block_weights else "method", problem, "leave it out")
    for name, adapter, _ in parts:
        check_understood(name, adapter)
        if not any(target.startswith(root(UNET)) for target in adapter.factors):
            raise ParamsError(name, "changes nothing in the UNet, so that no weight could be learnt", "use method sum")
