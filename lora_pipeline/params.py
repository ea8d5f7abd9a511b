"""`params.yaml` as typed, frozen values, without defaults: a value DVC cannot see is one it cannot rerun for."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lora_pipeline.errors import ParamsError
from lora_pipeline.yaml_file import read_yaml

# Of several faults reported for one value, these say most.
TELLING = ("extra_forbidden", "value_error")

# Without dots: to DVC `concepts.v1.5` is the key 5 of v1.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("a name is letters, digits, '-' and '_', and starts with a letter or digit")
    return value


def _relative(value: str) -> str:
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise ValueError("a path inside the project, without '..'")
    return value


def _number(value: Any) -> Any:
    """A whole number is a fine float; a boolean is not."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _sorted_knots(knots: list[tuple[float, float]]) -> list[tuple[float, float]]:
    places = [place for place, _ in knots]
    if places != sorted(set(places)) or not all(0 <= place <= 1 for place in places):
        raise ValueError("knots are [progress, weight] with progress rising from 0 to 1")
    return knots


def _one_rule(rule: dict[str, float]) -> dict[str, float]:
    kinds = sorted(set(rule) - {"max_rank"})
    if len(kinds) != 1 or kinds[0] not in ("energy", "error", "ratio", "threshold"):
        raise ValueError("one of energy, error, ratio and threshold with its value, and perhaps max_rank")
    if not 0 < rule[kinds[0]] < (math.inf if kinds[0] == "threshold" else 1):
        raise ValueError(f"{kinds[0]} is above 0{'' if kinds[0] == 'threshold' else ' and below 1'}")
    if rule.get("max_rank", 1) < 1 or not rule.get("max_rank", 1.0).is_integer():
        raise ValueError("max_rank is a whole number from 1")
    return rule


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(_name)]
RelativePath = Annotated[str, Field(min_length=1), AfterValidator(_relative)]
# How much of a layer's change to keep: a rank, or the fewest that leave a bounded loss, see adapters/ranks.py.
RankChoice = AtLeastOne | Annotated[dict[str, Float], AfterValidator(_one_rule)]
# YAML has lists where Python would have tuples.
Knot = Annotated[tuple[Float, Float], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Knots = Annotated[list[Knot], Field(min_length=1), AfterValidator(_sorted_knots)]
Weight = Float | Knots


class Section(BaseModel):
    """A section of the file: frozen, of exact types, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


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


class TrainParams(Section):
    """How a concept is learnt."""

    method: Literal["lora", "ti", "pti"]
    prior_weight: NotNegative
    batch_size: AtLeastOne
    rank: AtLeastOne
    alpha: Positive
    unet_targets: list[Text]
    text_encoder_targets: list[Text]
    inversion_steps: Count
    inversion_learning_rate: Positive
    tuning_steps: Count
    tuning_learning_rate: Positive
    initializer: str
    vectors: Annotated[int, Field(ge=1, le=64)]
    caption_dropout: Annotated[Float, Field(ge=0, lt=1)]
    checkpoint_every: AtLeastOne
    sample_prompt: Text


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


class RenderParams(Section):
    """A set of pictures: prompts by seeds."""

    source: RelativePath
    weights: Annotated[dict[Name, Weight], Field(min_length=1)]
    prompts: Annotated[list[Text], Field(min_length=1)]
    class_prompts: list[Text]
    seeds: Annotated[list[Count], Field(min_length=1)]
    steps: AtLeastOne
    guidance_scale: NotNegative
    negative_prompt: str
    evaluate: EvaluateParams


class Params(Section):
    """The whole experiment."""

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


def _learnable(where: str, concept: ConceptParams) -> None:
    train = concept.train
    if train.method in ("ti", "pti"):
        if concept.placeholder_token is None:
            problem, fix = f"is null, and method {train.method} learns it", "write one such as '<name>', or use lora"
            raise ParamsError(f"{where}.placeholder_token", problem, fix)
        if train.inversion_steps == 0:
            raise ParamsError(
                f"{where}.train.inversion_steps", f"is 0, and method {train.method} needs some", "write 100"
            )
    if train.method in ("lora", "pti"):
        if train.tuning_steps == 0:
            raise ParamsError(f"{where}.train.tuning_steps", f"is 0, and method {train.method} needs some", "write 200")
        if train.prior_weight > 0 and concept.priors.count == 0:
            problem = f"is {train.prior_weight:g}, and priors.count is 0"
            raise ParamsError(f"{where}.train.prior_weight", problem, "write 0, or set priors.count above 0")


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


def suggestion(name: object, known: Any) -> str:
    """What to write instead of the unknown `name`."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"write {near[0]!r}" if near else f"use one of {', '.join(sorted(map(str, known))) or 'nothing'}"


def load_params(path: Path) -> Params:
    """Read and check `path`.

    Raises:
        MissingError: There is no such file.
        ParamsError: A key is unknown, missing, or has a value that cannot be; the first fault is told.
    """
    content = read_yaml(path)
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise _explained(path, error) from None


def _explained(path: Path, error: ValidationError) -> ParamsError:
    # A wrong branch of a union is reported beside the right one; the fault deepest in the file is the user's.
    fault = max(error.errors(), key=lambda e: (e["type"] in TELLING, len(_keys(e["loc"]))))
    keys = _keys(fault["loc"])
    where = f"{path.name}: {'.'.join(keys)}" if keys else path.name
    if fault["type"] == "extra_forbidden":
        return ParamsError(where, "there is no such key", suggestion(keys[-1], _siblings(keys[:-1])))
    if fault["type"] == "missing":
        return ParamsError(where, "is missing", f"add `{keys[-1]}:` there")
    problem = fault["msg"].removeprefix("Value error, ")
    found = fault["input"]
    if fault["type"] == "literal_error":
        return ParamsError(where, f"{_lower(problem)}, found {found!r}", suggestion(found, _quoted(problem)))
    if isinstance(found, dict | list) and fault["type"] == "value_error":
        return ParamsError(where, problem, f"edit {where}")
    return ParamsError(where, f"{_lower(problem)}, found {found!r}", f"edit {where}")


def _quoted(text: str) -> list[str]:
    return re.findall("'([^']*)'", text)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the file in pydantic's location, without the names of the validators it went through."""
    inner = re.compile(r"[\[\](]|^(float|list|tuple|int|constrained-int|str|none)$")
    return [str(part) for part in loc if not (isinstance(part, str) and inner.search(part))]


def _siblings(keys: list[str]) -> list[str]:
    """The known keys of the section at `keys`."""
    model: type[BaseModel] = Params
    for key in keys:
        field = model.model_fields.get(key)
        if field is None:
            continue  # the name of a concept, blend, merge or render set
        inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
        model = next((t for t in inner if issubclass(t, BaseModel)), model)
    return list(model.model_fields)
