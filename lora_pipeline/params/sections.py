"""The sections of params.yaml, and what must be true across them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lora_pipeline.errors import ParamsError
from lora_pipeline.params.faults import suggestion
from lora_pipeline.params.training import Share, TrainParams
from lora_pipeline.params.values import (
    AtLeastOne,
    Count,
    Float,
    Knots,
    Name,
    NotNegative,
    Positive,
    RankChoice,
    RelativePath,
    Section,
    Text,
    Window,
)


class PreprocessParams(Section):
    """How raw pictures become training pictures."""

    resolution: Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
    crop: Literal["center", "random"]
    captions: Literal["files", "template"]
    template: str


class PriorsParams(Section):
    """The class pictures that the base draws of itself."""

    count: Count
    prompt: Text
    steps: AtLeastOne
    guidance_scale: NotNegative


class ExtractParams(Section):
    """The adapter's rank; null keeps the trained one."""

    rank: RankChoice | None


class ConceptParams(Section):
    """One subject or style."""

    kind: Literal["subject", "style"]
    images: RelativePath
    placeholder_token: Annotated[str, Field(min_length=2, pattern=r"^\S+$")] | None
    class_noun: Text
    preprocess: PreprocessParams
    priors: PriorsParams
    train: TrainParams
    extract: ExtractParams


class FitParams(Section):
    """How the weights of a blend are learnt, see training/blending.py."""

    granularity: Literal["adapter", "block", "column"]
    prompts: dict[Text, Annotated[list[Text], Field(min_length=1)]]
    draws: AtLeastOne
    steps: Count
    learning_rate: Positive
    regularisation: NotNegative


class BlendParams(Section):
    """Adapters that become one, see adapters/recipes.py."""

    weights: Annotated[dict[Name, Float], Field(min_length=1)]
    text_encoder_weights: dict[Name, Float]
    block_weights: dict[Name, dict[Text, Float] | list[Float]]
    method: Literal["sum", "interpolate", "ties", "dare", "magnitude", "least_squares", "distill"]
    path: list[Name] | None
    at: Annotated[Float, Field(ge=0, le=1)] | None
    density: Annotated[Float, Field(gt=0, le=1)] | None
    fit: FitParams | None
    rank: RankChoice | None
    rename_tokens: bool


class MergeParams(Section):
    """Adapters that are baked into a copy of the base."""

    weights: Annotated[dict[Name, Float], Field(min_length=1)]
    dtype: Literal["float16", "bfloat16", "float32"]


class EvaluateParams(Section):
    """What a render set is held against."""

    subject: Name | None
    style: Name | None
    judge: RelativePath


class WeightParams(Section):
    """A weight over steps and layers, see rendering/schedule.py."""

    knots: Float | Knots
    between: Literal["hold", "linear", "cosine"]
    window: Window
    blocks: dict[Text, Float] | list[Float]


def _form(weight: Any) -> str:
    """Which of its forms a weight is meant to be, so that its faults are told of that one."""
    if isinstance(weight, dict | Section):
        return "schedule[]"
    return "knots[]" if isinstance(weight, list) else "number[]"


# A number, knots, or all that can be said.
Weight = Annotated[
    Annotated[Float, Tag("number[]")] | Annotated[Knots, Tag("knots[]")] | Annotated[WeightParams, Tag("schedule[]")],
    Discriminator(_form),
]


class RenderParams(Section):
    """A set of pictures: prompts by seeds."""

    source: RelativePath
    weights: Annotated[dict[Name, Weight], Field(min_length=1)]
    combine: Literal["sum", "switch", "composite", "k_lora"]
    switch_every: AtLeastOne
    executor: Literal["auto", "fuse", "cache", "gate"]
    prompts: Annotated[list[Text], Field(min_length=1)]
    class_prompts: list[Text]
    seeds: Annotated[list[Count], Field(min_length=1)]
    sampler: Text | None
    sampler_options: dict[Text, Any]
    steps: AtLeastOne
    guidance_scale: NotNegative
    guidance_rescale: Share
    negative_prompt: str
    evaluate: EvaluateParams


class Params(Section):
    """The whole experiment; what `defaults` says of every concept stands in the concepts."""

    seed: Count
    base: RelativePath
    concepts: dict[Name, ConceptParams]
    blends: dict[Name, BlendParams]
    merges: dict[Name, MergeParams]
    renders: dict[Name, RenderParams]

    @model_validator(mode="after")
    def _concepts_can_be_learnt(self) -> Params:
        for name, concept in self.concepts.items():
            _learnable(f"params.yaml: concepts.{name}", concept)
        return self

    @model_validator(mode="after")
    def _blends_can_be_made(self) -> Params:
        for name, blend in self.blends.items():
            _makeable(f"params.yaml: blends.{name}", blend)
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Params:
        for section, recipes in (("blends", self.blends), ("merges", self.merges)):
            for name, recipe in recipes.items():
                _known(f"{section}.{name}.weights", recipe.weights, self.concepts)
        for name, render in self.renders.items():
            asked = [n for n in (render.evaluate.subject, render.evaluate.style) if n is not None]
            _known(f"renders.{name}.evaluate", asked, self.concepts)
            _known(f"renders.{name}.weights", render.weights, {**self.concepts, **self.blends})
        return self


# The phases of each method, and those that learn from class pictures.
_PHASES = {
    "ti": {"inversion"}, "pti": {"inversion", "tuning"}, "lora": {"tuning"}, "dreambooth": {"tuning"},
    "joint": {"tuning"}, "full": {"tuning"},
}  # fmt: skip


def _learnable(where: str, concept: ConceptParams) -> None:
    train, phases = concept.train, _PHASES[concept.train.method]
    if train.method in ("ti", "pti", "joint") and concept.placeholder_token is None:
        problem, fix = f"is null, and method {train.method} learns it", "write one such as '<name>', or use lora"
        raise ParamsError(f"{where}.placeholder_token", problem, fix)
    for phase in ("inversion", "tuning"):
        if phase in phases and getattr(train, phase).steps == 0:
            raise ParamsError(
                f"{where}.train.{phase}.steps", f"is 0, and method {train.method} needs some", "write 100"
            )
    prior = train.prior
    if train.method == "dreambooth" and prior.weight == 0:
        raise ParamsError(f"{where}.train.prior.weight", "is 0, and method dreambooth needs it", "write 1, or use lora")
    if train.method == "full" and concept.extract.rank is None:
        problem, fix = "is null, and method full learns whole weights", "write a rank, or {energy: 0.9}"
        raise ParamsError(f"{where}.extract.rank", problem, fix)
    if "tuning" in phases and prior.weight > 0 and prior.target == "pictures" and concept.priors.count == 0:
        problem = f"is {prior.weight:g}, and priors.count is 0"
        raise ParamsError(f"{where}.train.prior.weight", problem, "write 0, or set priors.count above 0")


# What else a blend's method needs; the others have no use for it.
_NEEDED = {
    "interpolate": {"path", "at"}, "ties": {"density"}, "dare": {"density"}, "magnitude": {"density"},
    "least_squares": {"fit"}, "distill": {"fit"},
}  # fmt: skip
_EXAMPLES = {
    "path": "the adapters' names in their order", "at": "0.5 for the middle", "density": "0.2 for a fifth",
    "fit": "granularity, prompts, draws, steps, learning_rate and regularisation there",
}  # fmt: skip


def _makeable(where: str, blend: BlendParams) -> None:
    for key, example in _EXAMPLES.items():
        needed, given = key in _NEEDED.get(blend.method, ()), getattr(blend, key) is not None
        if needed and not given:
            raise ParamsError(f"{where}.{key}", f"is null, and method {blend.method} needs it", f"write {example}")
        if given and not needed:
            raise ParamsError(f"{where}.{key}", f"means nothing to method {blend.method}", "write null")
    for key in ("text_encoder_weights", "block_weights"):
        _known(f"{where.removeprefix('params.yaml: ')}.{key}", getattr(blend, key), blend.weights)
    if blend.fit is not None:
        _fittable(where, blend, blend.fit)
    if blend.path is not None and sorted(blend.path) != sorted(blend.weights):
        names = ", ".join(blend.weights)
        raise ParamsError(f"{where}.path", f"is not an order of {names}", "name each of them once")


def _fittable(where: str, blend: BlendParams, fit: FitParams) -> None:
    if blend.block_weights:
        raise ParamsError(f"{where}.block_weights", f"fixes what method {blend.method} learns", "write {}")
    told = [name for scene in fit.prompts for name in scene.split("+")]
    _known(f"{where.removeprefix('params.yaml: ')}.fit.prompts", told, blend.weights)
    for name in blend.weights:
        if name not in told:
            raise ParamsError(f"{where}.fit.prompts", f"has none for {name!r}", "say there what it is for")
    if blend.method == "distill" and fit.steps == 0:
        raise ParamsError(f"{where}.fit.steps", "is 0, and method distill needs some", "write 200")
    if blend.method == "least_squares" and fit.granularity == "column":
        problem, fix = "column is not for method least_squares", "write adapter or block, or use method distill"
        raise ParamsError(f"{where}.fit.granularity", problem, fix)


def _known(where: str, names: Any, known: Any) -> None:
    for name in names:
        if name not in known:
            raise ParamsError(
                f"params.yaml: {where}", f"names {name!r}, which is neither of {sorted(known)}", suggestion(name, known)
            )
