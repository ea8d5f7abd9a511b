"""`lora-pipe merge`: adapters become part of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.errors import UsageError
from lora_pipeline.params import load_params
from stages._model_out import check_replaceable
from stages._stage import PARAMS, entry, stage
from stages._weighted import Weighted, by_name, load_parts, named, parse_weighted


def merge(  # noqa: PLR0913 - the options of a command
    base: Annotated[Path, typer.Option(help="The base: a diffusers folder, or a single file of SD1, SD2 or SDXL.")],
    out: Annotated[Path, typer.Option(help="What to write: X.safetensors, X.ckpt, or else a diffusers folder.")],
    files: Annotated[list[str] | None, typer.Argument(help="Adapters by hand: FILE or FILE=WEIGHT.")] = None,
    name: Annotated[str | None, typer.Option(help="A merge of params.yaml.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="The folder of the merge's adapters.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="By hand: float16, bfloat16 or float32; default the base's.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Single file to folder: a folder of the same family, for its configs.")
    ] = None,
    without_tokens: Annotated[
        bool, typer.Option("--without-tokens", help="Leave the adapters' tokens out: single files cannot hold them.")
    ] = False,
    undo: Annotated[
        Path | None, typer.Option(help="Instead of adapters: what was merged; the base's weights are written again.")
    ] = None,
) -> None:
    """Fold adapters and their tokens into a base; plain diffusers loads the result, or an older UI the single file.

    Examples:

        lora-pipe merge --name zorp --adapters models/adapters --base models/base --out models/merged/zorp

        lora-pipe merge zorp.safetensors sticker.safetensors=0.5 --base v1-5.safetensors --out both.ckpt

        lora-pipe merge --undo both.ckpt --base v1-5.safetensors --out v1-5-again.safetensors
    """
    from lora_pipeline.adapters.merging import SINGLE_FILES
    from lora_pipeline.adapters.merging import merge as merged
    from lora_pipeline.adapters.merging import undo as undone

    by_hand = files and not (name or adapters or undo)
    by_params = name and adapters and not (files or dtype or undo or like or without_tokens)
    if not (by_hand or by_params or (undo and not (files or name or adapters or dtype or without_tokens))):
        problem = "needs either --name and --adapters, or files, or --undo"
        raise UsageError("merge", problem, "see lora-pipe merge --help")

    def recipe() -> tuple[list[Weighted], str | None]:
        if name and adapters:
            section = entry(load_params(PARAMS).merges, "merges", name)
            return named(adapters, section.weights), section.dtype
        return parse_weighted(files or []), dtype

    def settings() -> dict[str, object]:
        weighted, kind = recipe()
        return {"dtype": kind, "weights": by_name(weighted)}

    check_replaceable(out, base, out.suffix in SINGLE_FILES)
    weighted, kind = recipe()
    inputs = [base, *(path for path, _ in weighted), *(path for path in (like, undo) if path)]
    with stage("merge", name or out.name, out=out, inputs=inputs, section=settings) as run:
        if undo:
            undone(undo, base, run.building, like=like)
        else:
            merged(base, load_parts(weighted), run.building, kind, like=like, tokens=not without_tokens)
