"""`lora-pipe check`: params.yaml, before anything heavy starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.adapters.blocks import check_names
from lora_pipeline.errors import MissingError
from lora_pipeline.params import Params, load_params


def check(
    file: Annotated[Path, typer.Argument(help="The parameter file.")] = Path("params.yaml"),
) -> None:
    """Say whether params.yaml is sound, its folders are there, and what is in it.

    Examples:

        lora-pipe check

        lora-pipe check other.yaml

        lora-pipe check && dvc repro
    """
    params = load_params(file)
    for key, path in folders(params).items():
        if not Path(path).is_dir():
            raise MissingError(f"{file.name}: {key}", f"there is no folder {path}", "set it to one that is there")
    for name, concept in params.concepts.items():
        typer.echo(f"concept {name}: {concept.kind}, {concept.train.method}, from {concept.images}")
    for name, blend in params.blends.items():
        for adapter, factors in blend.block_weights.items():
            check_names(f"{file.name}: blends.{name}.block_weights.{adapter}", factors)
        weights = ", ".join(f"{part}={weight:g}" for part, weight in blend.weights.items())
        typer.echo(f"blend {name}: {blend.method} of {weights}")
    for name, render in params.renders.items():
        pictures = (len(render.prompts) + len(render.class_prompts)) * len(render.seeds)
        typer.echo(f"render set {name}: {pictures} pictures from {render.source}")


def folders(params: Params) -> dict[str, str]:
    """What no stage makes: the folders that users bring, by key."""
    brought = {"base": params.base}
    brought |= {f"concepts.{name}.images": concept.images for name, concept in params.concepts.items()}
    return brought | {
        f"renders.{name}.evaluate.judge": render.evaluate.judge for name, render in params.renders.items()
    }
