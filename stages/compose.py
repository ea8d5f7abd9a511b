"""`lora-pipe compose`: several adapters become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_pipeline.errors import ParamsError, UsageError
from lora_pipeline.params import load_params
from stages._extraction_report import write_report
from stages._fit import fit_by_hand, fit_of_blend, learn
from stages._rank_rule import rule_of
from stages._stage import PARAMS, entry, stage
from stages._weighted import Weighted, by_name, load_parts, named, parse_blocks, parse_named, parse_weighted

if TYPE_CHECKING:
    from lora_pipeline.adapters.recipes import Recipe
    from lora_pipeline.training.fit import Fit


Method = Literal["sum", "interpolate", "ties", "dare", "magnitude", "least_squares", "distill"]
Granularity = Literal["adapter", "block", "column"]


@dataclass(frozen=True)
class Order:
    """What is to be composed, and how."""

    adapters: list[Weighted]
    recipe: Recipe
    fit: Fit | None

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result; the adapters' order is that of a path."""
        order = [path.stem for path, _ in self.adapters]
        fit = asdict(self.fit) if self.fit else None
        return {"weights": by_name(self.adapters), "order": order, **asdict(self.recipe), "fit": fit}


def compose(  # noqa: PLR0913 - the options of a command
    out: Annotated[Path, typer.Option(help="The adapter to write.")],
    files: Annotated[list[str] | None, typer.Argument(help="Adapters by hand: FILE or FILE=WEIGHT.")] = None,
    blend: Annotated[str | None, typer.Option(help="A blend of params.yaml.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="The folder of the blend's adapters.")] = None,
    text_encoder_weight: Annotated[
        list[str] | None, typer.Option(help="Another weight in the text encoder: NAME=WEIGHT; may be repeated.")
    ] = None,
    block_weights: Annotated[
        list[str] | None,
        typer.Option(help="Factors of weights: NAME=IN04:0.5,*attn2*:0 or NAME=1,0,...; may be repeated."),
    ] = None,
    method: Annotated[Method | None, typer.Option(help="By hand; without it sum.")] = None,
    at: Annotated[float | None, typer.Option(help="interpolate: 0, the first file, to 1, the last.")] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare, magnitude: share of values kept.")] = None,
    base: Annotated[Path | None, typer.Option(help="least_squares, distill: the base, a diffusers folder.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="least_squares, distill: ADAPTER=PROMPT it is for, or ONE+OTHER=PROMPT; may be repeated."),
    ] = None,
    granularity: Annotated[
        Granularity | None, typer.Option(help="What gets a weight of its own; block. column is for distill.")
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Pictures drawn of each adapter; 6.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="distill: optimiser steps; 200.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="distill: of the weights; 0.02.")] = None,
    regularisation: Annotated[
        float | None, typer.Option(help="Pull towards the given weights, or columns apart; 0.01.", min=0)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="dare, learnt weights: decides chance; default 0.", min=0)] = None,
    rank: Annotated[int | None, typer.Option(help="Cut every layer to this rank.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of each layer's energy, as 0.95.")] = None,
    error: Annotated[float | None, typer.Option(help="Lose no more than this of each layer, as 0.1.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="No rank above this, whatever else is asked.")] = None,
    rename_tokens: Annotated[
        bool, typer.Option("--rename-tokens", help="A token of two adapters becomes <token> and <token-2>.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="JSON of each layer's error; a PNG beside it shows it.")] = None,
) -> None:
    """Make one adapter of several: the weighted sum of what they change, or another mixture, and all their tokens.

    Examples:

        lora-pipe compose --blend zorp-sticker --adapters models/adapters --out models/blends/zorp-sticker.safetensors

        lora-pipe compose zorp.safetensors=0.7 sticker.safetensors=-0.5 --rank 8 --out both.safetensors

        lora-pipe compose a.safetensors b.safetensors --method ties --density 0.2 --out c.safetensors --report c.json
    """
    bound = {"rank": rank, "energy": energy, "error": error}
    options: dict[str, Any] = {
        "method": method, "at": at, "density": density, "seed": seed, "rank": rule_of(bound, max_rank),
        "text_encoder_weights": parse_named(text_encoder_weight or []) or None,
        "block_weights": parse_blocks(block_weights or []) or None,
        "rename_tokens": rename_tokens or None,
    }  # fmt: skip
    given = {key: value for key, value in options.items() if value is not None}
    learning = {
        "granularity": granularity, "draws": draws, "steps": steps, "learning_rate": learning_rate,
        "regularisation": regularisation,
    }  # fmt: skip
    learning = {key: value for key, value in learning.items() if value is not None}
    by_params = blend and adapters and not (files or given or prompt or learning)
    if not (by_params or (files and not blend and not adapters)):
        fix = "see lora-pipe compose --help"
        raise UsageError("compose", "needs either --blend and --adapters alone, or files", fix)

    def order() -> Order:
        return of_blend(blend, adapters) if blend and adapters else by_hand(files or [], given, prompt or [], learning)

    make(blend or out.stem, order, out, report, base)


def of_blend(name: str, adapters: Path) -> Order:
    """The blend `name` of params.yaml with its adapters from a folder; on a path, in its order.

    Raises:
        ParamsError: There is no such blend.
    """
    from lora_pipeline.adapters.ranks import rank_rule
    from lora_pipeline.adapters.recipes import Recipe

    params = load_params(PARAMS)
    section = entry(params.blends, "blends", name)
    files = named(adapters, section.weights)
    if (path := section.path) is not None:
        files.sort(key=lambda file: path.index(file[0].stem))
    fields = section.model_dump(exclude={"weights", "path", "rank", "fit"})
    if section.fit is not None:
        fields["method"] = "sum"
    recipe = Recipe(**fields, seed=params.seed, rank=rank_rule(section.rank))
    return Order(files, recipe, fit_of_blend(section, params.seed))


def by_hand(
    files: Sequence[str], options: Mapping[str, Any], prompts: Sequence[str], learning: Mapping[str, Any]
) -> Order:
    """What the command line asks for.

    Raises:
        UsageError: An option that does not go with the method, or is out of its range.
    """
    from lora_pipeline.adapters.recipes import Recipe

    adapters = parse_weighted(files)
    try:
        fit = fit_by_hand(adapters, options, prompts, learning)
        return Order(adapters, Recipe(**{**options, "method": "sum"} if fit else options), fit)
    except ParamsError as error:
        option = "prompt" if error.where == "prompts" else error.where.replace("_", "-")
        raise UsageError(f"--{option}", error.problem, error.fix) from None


def make(instance: str, order: Callable[[], Order], out: Path, report: Path | None, base: Path | None) -> None:
    """Composes, and says what that cost.

    Raises:
        UsageError: Weights are to be learnt without a base.
    """
    from lora_pipeline.adapters import save_adapter
    from lora_pipeline.adapters.composition import blend
    from lora_pipeline.adapters.extraction import Extraction

    now = order()
    if now.fit and base is None:
        raise UsageError("--base", f"is missing, and method {now.fit.method} learns from it", "name a diffusers folder")
    outs = [out, report, report.with_suffix(".png")] if report else [out]
    inputs = [path for path, _ in now.adapters] + ([base] if now.fit and base else [])
    with stage("compose", instance, out=outs, inputs=inputs, section=lambda: order().settings()) as run:
        parts = load_parts(now.adapters)
        composition = learn(base, parts, now.recipe, now.fit, run) if now.fit and base else blend(parts, now.recipe)
        save_adapter(composition.adapter, run.building)
        run.tracker.metric("residual", composition.residual, 0)
        if report or composition.residual:
            files = run.outs[1:] if report else (run.work / "layers.json", run.work / "layers.png")
            write_report(Extraction(composition.adapter, composition.layers), *files)
            for file in files:
                run.tracker.artifact(file)
    for (path, _), renamed in zip(now.adapters, composition.renamed, strict=True):
        for token, name in renamed.items():
            typer.echo(f"{out}: {token} of {path.stem} is {name}")
    if composition.residual:
        typer.echo(f"{out}: its ranks lose {composition.residual:.1%} of the change")
