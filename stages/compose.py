"""`lora-pipe compose`: several adapters become one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.errors import UsageError
from lora_pipeline.params import load_params
from stages._stage import PARAMS, entry, stage
from stages._weighted import Weighted, by_name, load_parts, named, parse_weighted


def compose(
    out: Annotated[Path, typer.Option(help="The adapter to write.")],
    files: Annotated[list[str] | None, typer.Argument(help="Adapters by hand: FILE or FILE=WEIGHT.")] = None,
    blend: Annotated[str | None, typer.Option(help="A blend of params.yaml.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="The folder of the blend's adapters.")] = None,
) -> None:
    """Make one adapter of several: the exact weighted sum of what they change, and all their tokens.

    Examples:

        lora-pipe compose --blend zorp-sticker --adapters models/adapters --out models/blends/zorp-sticker.safetensors

        lora-pipe compose zorp.safetensors=0.7 sticker.safetensors=0.5 --out both.safetensors

        lora-pipe compose with.safetensors without.safetensors=-1 --out difference.safetensors
    """
    from lora_pipeline.adapters import save_adapter
    from lora_pipeline.adapters.composition import compose as composed

    if not ((blend and adapters and not files) or (files and not blend and not adapters)):
        raise UsageError("compose", "needs either --blend and --adapters, or files", "see lora-pipe compose --help")

    def weighted() -> list[Weighted]:
        if blend and adapters:
            return named(adapters, entry(load_params(PARAMS).blends, "blends", blend).weights)
        return parse_weighted(files or [])

    inputs = [path for path, _ in weighted()]
    with stage("compose", blend or out.stem, out=out, inputs=inputs, section=lambda: by_name(weighted())) as run:
        save_adapter(composed(load_parts(weighted())), run.building)
