"""`lora-pipe merge`: adapters become part of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.errors import UsageError
from lora_pipeline.params import load_params
from stages._stage import entry, stage
from stages._weighted import load_parts, named, parse_weighted

PARAMS = Path("params.yaml")


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

    if name is not None and adapters is not None and not files and dtype is None:
        section = entry(load_params(PARAMS).merges, "merges", name)
        weighted, dtype = named(adapters, section.weights), section.dtype
    elif files and name is None and adapters is None:
        weighted = parse_weighted(files)
    else:
        raise UsageError("merge", "needs either --name and --adapters, or files", "see lora-pipe merge --help")
    settings = {"dtype": dtype, "weights": {path.stem: weight for path, weight in weighted}}
    inputs = [base, *(path for path, _ in weighted)]
    with stage("merge", name or out.name, out=out, inputs=inputs, section=settings) as run:
        merged(base, load_parts(weighted), run.building, dtype)
