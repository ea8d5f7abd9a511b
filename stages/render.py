"""`lora-pipe render`: pictures from prompts, with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_pipeline.errors import ParamsError, UsageError
from lora_pipeline.params import Weight, load_params
from stages._stage import PARAMS, entry, stage
from stages._weighted import parse_weighted

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json
    from lora_pipeline.rendering.attachment import Attachment

BY_HAND: dict[str, Any] = {"class_prompts": [], "seeds": [1], "steps": 20, "guidance_scale": 3.0, "negative_prompt": ""}


@dataclass(frozen=True)
class Recipe:
    """Adapters with their weights, and the fields of a PictureSet."""

    adapters: tuple[tuple[Path, Weight], ...]
    fields: Mapping[str, Any]

    def weights(self) -> dict[str, Weight]:
        """By adapter name."""
        return {path.stem: weight for path, weight in self.adapters}


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
    from lora_pipeline.rendering.attachment import attach, check_placeholders
    from lora_pipeline.rendering.picture_set import PictureSet, write_set

    options = {
        "prompts": prompt, "seeds": seed, "steps": steps, "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value not in (None, [])}
    if not ((render_set and source and not files and not given) or (prompt and not render_set and not source)):
        raise UsageError("render", "needs either --set and --source, or --prompt", "see lora-pipe render --help")

    def recipe() -> Recipe:
        if render_set and source:
            return recipe_of_set(render_set, source)
        return Recipe(tuple(parse_weighted(files or [])), {**BY_HAND, **given})

    def settings() -> dict[str, object]:
        return {**recipe().fields, "weights": recipe().weights()}

    now = recipe()
    inputs = [base, *(path for path, _ in now.adapters)]
    with stage("render", render_set or out.name, out=out, inputs=inputs, section=settings) as run:
        pictures = PictureSet(**now.fields)
        fingerprint = base_fingerprint(base)
        attachments = load_attachments(now, fingerprint)
        components = load_components(base)
        weights_at = attach(components, attachments)
        prompts = [*pictures.prompts, *pictures.class_prompts, pictures.negative_prompt]
        check_placeholders(components.tokenizer, [each.adapter for each in attachments], prompts)
        origin: dict[str, Json] = {
            "adapters": {path.stem: file_digest(path) for path, _ in now.adapters},
            "base": fingerprint,
            "code": version("lora-pipeline"),
            "weights": now.weights(),
        }
        with run.progress(len(pictures.rows) * len(pictures.seeds), "pictures") as advance:
            write_set(components, pictures, weights_at, origin, run.building, advance)
        run.tracker.artifact(run.building / "sheet.png")


def recipe_of_set(name: str, source: Path) -> Recipe:
    """The set `name` of params.yaml with its adapters from `source`: a file, whose stem is its name, or a folder.

    Raises:
        ParamsError: There is no such set, or it weighs another adapter than the file.
    """
    section = entry(load_params(PARAMS).renders, "renders", name)
    fields = section.model_dump(mode="json", include={"prompts", "seeds", *BY_HAND})
    weights = section.weights
    if source.is_dir():
        return Recipe(tuple((source / f"{each}.safetensors", weights[each]) for each in sorted(weights)), fields)
    if set(weights) != {source.stem}:
        where, problem = f"params.yaml: renders.{name}.weights", f"weighs {', '.join(sorted(weights))}"
        raise ParamsError(where, f"{problem}, and {source} is {source.stem}", f"write {{{source.stem}: 1.0}}")
    return Recipe(((source, weights[source.stem]),), fields)


def load_attachments(recipe: Recipe, base: str) -> list[Attachment]:
    """Loads the adapters, each named after its file.

    Raises:
        CorruptError: A file is no adapter, or is one of another base.
    """
    from lora_pipeline.adapters import load_adapter
    from lora_pipeline.adapters.adapter import check_base
    from lora_pipeline.rendering.attachment import Attachment
    from lora_pipeline.rendering.schedule import schedule

    attachments = []
    for path, weight in recipe.adapters:
        adapter = load_adapter(path)
        check_base(str(path), adapter, base)
        attachments.append(Attachment(path.stem, adapter, schedule(weight)))
    return attachments
