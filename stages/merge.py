"""`lora-pipe merge`: adapters become part of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.errors import UsageError
from lora_pipeline.params import load_params
from stages._stage import PARAMS, entry, stage
from stages._weighted import Weighted, by_name, load_parts, named, parse_weighted


def merge(
    base: Annotated[Path, typer.Option(help="The base, a diffusers folder.")],
    out: Annotated[Path, typer.Option(help="The diffusers folder to write.")],
    files: Annotated[list[str] | None, typer.Argument(help="Adapters by hand: FILE or FILE=WEIGHT.")] = None,
    name: Annotated[str | None, typer.Option(help="A merge of params.yaml.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="The folder of the merge's adapters.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="By hand: float16, bfloat16 or float32; default the base's.")
    ] = None,
) -> None:
    """Fold adapters and their tokens into a base; plain diffusers loads the result.

    Examples:

        lora-pipe merge --name zorp --adapters models/adapters --base models/base --out models/merged/zorp

        lora-pipe merge zorp.safetensors=0.8 --base models/base --out zorp-base

        lora-pipe merge zorp.safetensors sticker.safetensors=0.5 --base models/base --out both --dtype float32
    """
    from lora_pipeline.adapters.merging import merge as merged

    if not ((name and adapters and not files and not dtype) or (files and not name and not adapters)):
        raise UsageError("merge", "needs either --name and --adapters, or files", "see lora-pipe merge --help")

    def recipe() -> tuple[list[Weighted], str | None]:
        if name and adapters:
            section = entry(load_params(PARAMS).merges, "merges", name)
            return named(adapters, section.weights), section.dtype
        return parse_weighted(files or []), dtype

    def settings() -> dict[str, object]:
        weighted, kind = recipe()
        return {"dtype": kind, "weights": by_name(weighted)}

    weighted, kind = recipe()
    inputs = [base, *(path for path, _ in weighted)]
    with stage("merge", name or out.name, out=out, inputs=inputs, section=settings) as run:
        merged(base, load_parts(weighted), run.building, kind)
