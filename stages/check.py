"""`lora-pipe check`: params.yaml, before anything heavy starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.params import load_params


def check(
    file: Annotated[Path, typer.Argument(help="The parameter file.")] = Path("params.yaml"),
) -> None:
    """Say whether params.yaml is sound, and what is in it.

    Examples:

        lora-pipe check

        lora-pipe check other.yaml

        lora-pipe check && dvc repro
    """
    params = load_params(file)
    for name, concept in params.concepts.items():
        typer.echo(f"concept {name}: {concept.kind}, {concept.train.method}, from {concept.images}")
    for name, blend in params.blends.items():
        weights = ", ".join(f"{part}={weight:g}" for part, weight in blend.weights.items())
        typer.echo(f"blend {name}: {blend.method} of {weights}")
    for name, render in params.renders.items():
        pictures = (len(render.prompts) + len(render.class_prompts)) * len(render.seeds)
        typer.echo(f"render set {name}: {pictures} pictures from {render.source}")
