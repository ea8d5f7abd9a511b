"""`lora-pipe render`: pictures from prompts, with adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_pipeline.errors import ParamsError, UsageError
from lora_pipeline.params import WeightParams, load_params
from stages._stage import PARAMS, entry, stage
from stages._weighted import parse_weighted

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json
    from lora_pipeline.rendering.attachment import Attachment
    from lora_pipeline.rendering.schedule import WeightSchedule

Weight = float | list[tuple[float, float]] | WeightParams
BY_HAND: dict[str, Any] = {
    "class_prompts": [], "seeds": [1], "steps": 20, "guidance_scale": 3.0, "guidance_rescale": 0.0,
    "negative_prompt": "",
}  # fmt: skip
SAMPLER: dict[str, Any] = {"sampler": None, "sampler_options": {}}
ACTING: dict[str, Any] = {"combine": "sum", "switch_every": 1, "executor": "auto"}


@dataclass(frozen=True)
class Recipe:
    """Adapters with their weights, the fields of a PictureSet, and how the adapters act together."""

    adapters: tuple[tuple[Path, Weight], ...]
    fields: Mapping[str, Any]
    acting: Mapping[str, Any]
    sampler: Mapping[str, Any]

    def weights(self) -> dict[str, Json]:
        """By adapter name, as JSON."""
        return {
            path.stem: weight.model_dump(mode="json") if isinstance(weight, WeightParams) else weight
            for path, weight in self.adapters
        }

    def told(self) -> dict[str, Json]:
        """What a picture's recipe says of them; not the executor, which changes nothing."""
        together = {name: self.acting[name] for name in ("combine", "switch_every")}
        return {**together, **self.sampler, "weights": self.weights()}


def render(  # noqa: PLR0913 - the options of a command
    base: Annotated[Path, typer.Option(help="The base, a diffusers folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    files: Annotated[list[str] | None, typer.Argument(help="Adapters by hand: FILE or FILE=WEIGHT.")] = None,
    render_set: Annotated[str | None, typer.Option("--set", help="A render set of params.yaml.")] = None,
    source: Annotated[Path | None, typer.Option(help="The set's adapter, or the folder of its adapters.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="By hand: what to draw; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="By hand; may be repeated; default 1.", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="By hand: denoising steps; default 20.", min=1)] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="By hand: default 3; 1 and below is no guidance.", min=0)
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="By hand: what to keep away from.")] = None,
    sampler: Annotated[str | None, typer.Option(help="By hand: of diffusers, as EulerDiscrete.")] = None,
) -> None:
    """Draw every prompt from every seed, with adapters at a weight or at a schedule of weights.

    Examples:

        lora-pipe render --set zorp --source models/adapters/zorp.safetensors --base models/base --out renders/zorp

        lora-pipe render zorp.safetensors=0.8 --base models/base --prompt "a <zorp> creature at night" --out night

        lora-pipe render --base models/base --prompt "a cat" --prompt "a robot" --seed 1 --seed 2 --out of-the-base
    """
    from lora_pipeline.adapters.fingerprint import base_fingerprint
    from lora_pipeline.keeping import file_digest
    from lora_pipeline.pretrained.components import load_components
    from lora_pipeline.pretrained.samplers import sampler_of
    from lora_pipeline.rendering.attachment import acting, attach, check_placeholders
    from lora_pipeline.rendering.picture_set import PictureSet, write_set

    options = {
        "prompts": prompt, "seeds": seed, "steps": steps, "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value not in (None, [])}
    by_set = render_set and source and not files and not given and sampler is None
    if not (by_set or (prompt and not render_set and not source)):
        raise UsageError("render", "needs either --set and --source, or --prompt", "see lora-pipe render --help")

    def recipe() -> Recipe:
        if render_set and source:
            return recipe_of_set(render_set, source)
        by_hand = {**SAMPLER, "sampler": sampler}
        return Recipe(tuple(parse_weighted(files or [])), {**BY_HAND, **given}, ACTING, by_hand)

    def settings() -> dict[str, object]:
        return {**recipe().fields, **recipe().told(), **recipe().acting}

    now = recipe()
    inputs = [base, *(path for path, _ in now.adapters)]
    with stage("render", render_set or out.name, out=out, inputs=inputs, section=settings) as run:
        pictures = PictureSet(**now.fields)
        fingerprint = base_fingerprint(base)
        attachments = load_attachments(now, fingerprint)
        components = load_components(base)
        with _located(render_set):
            own = sampler_of(components.scheduler, now.sampler["sampler"], now.sampler["sampler_options"])
        components = replace(components, scheduler=own)
        attach(components, attachments)
        prompts = [*pictures.prompts, *pictures.class_prompts, pictures.negative_prompt]
        check_placeholders(components.tokenizer, [each.adapter for each in attachments], prompts)
        origin: dict[str, Json] = {
            "adapters": {path.stem: file_digest(path) for path, _ in now.adapters},
            "base": fingerprint,
            "code": version("lora-pipeline"),
            **now.told(),
        }
        combine, every, executor = now.acting.values()
        how = {"combine": combine, "every": every, "executor": executor}
        with (
            _located(render_set),
            acting(components, attachments, pictures.steps, **how) as weighting,
            run.progress(len(pictures.rows) * len(pictures.seeds), "pictures") as advance,
        ):
            write_set(components, pictures, weighting, origin, run.building, advance)
        run.tracker.artifact(run.building / "sheet.png")


def recipe_of_set(name: str, source: Path) -> Recipe:
    """The set `name` of params.yaml with its adapters from `source`: a file, whose stem is its name, or a folder.

    Raises:
        ParamsError: There is no such set, or it weighs another adapter than the file.
    """
    section = entry(load_params(PARAMS).renders, "renders", name)
    fields = section.model_dump(mode="json", include={"prompts", "seeds", *BY_HAND})
    together, sampler = ({name: getattr(section, name) for name in names} for names in (ACTING, SAMPLER))
    weights = section.weights
    if source.is_dir():
        return Recipe(
            tuple((source / f"{name}.safetensors", each) for name, each in weights.items()), fields, together, sampler
        )
    if set(weights) != {source.stem}:
        where, problem = f"params.yaml: renders.{name}.weights", f"weighs {', '.join(sorted(weights))}"
        raise ParamsError(where, f"{problem}, and {source} is {source.stem}", f"write {{{source.stem}: 1.0}}")
    return Recipe(((source, weights[source.stem]),), fields, together, sampler)


def load_attachments(recipe: Recipe, base: str) -> list[Attachment]:
    """Loads the adapters, each named after its file.

    Raises:
        CorruptError: A file is no adapter, or is one of another base.
    """
    from lora_pipeline.adapters import load_adapter
    from lora_pipeline.adapters.adapter import check_base
    from lora_pipeline.rendering.attachment import Attachment

    attachments = []
    for path, weight in recipe.adapters:
        adapter = load_adapter(path)
        check_base(str(path), adapter, base)
        attachments.append(Attachment(path.stem, adapter, _schedule(weight)))
    return attachments


@contextmanager
def _located(render_set: str | None) -> Iterator[None]:
    """Gives errors about a set's weights the value's full path in params.yaml."""
    try:
        yield
    except ParamsError as error:
        if render_set is None or not error.where.startswith(("weights.", "combine", "sampler")):
            raise
        raise ParamsError(f"params.yaml: renders.{render_set}.{error.where}", error.problem, error.fix) from None


def _schedule(weight: Weight) -> WeightSchedule:
    from lora_pipeline.rendering.schedule import schedule

    if not isinstance(weight, WeightParams):
        return schedule(weight)
    return schedule(weight.knots, between=weight.between, window=weight.window, blocks=weight.blocks)
