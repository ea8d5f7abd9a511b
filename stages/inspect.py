"""`lora-pipe inspect`: what an adapter is, from its header alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.adapters.description import Description, describe


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter, or any other safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Show what an adapter changes, its ranks, its tokens and where it comes from.

    Examples:

        lora-pipe inspect models/adapters/zorp.safetensors

        lora-pipe inspect models/blends/zorp-sticker.safetensors --json

        lora-pipe inspect pytorch_lora_weights.safetensors
    """
    description = describe(file)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(description), indent=2, sort_keys=True, ensure_ascii=False))
    else:
        typer.echo("\n".join(_lines(description)))


def _lines(description: Description) -> list[str]:
    fields = {
        "format": description.format,
        "layers": _listed(description.layers),
        "ranks": ", ".join(f"{rank} ({count} layers)" for rank, count in description.ranks.items()) or "none",
        "tokens": _listed(description.tokens),
        "dtypes": _listed(description.dtypes),
        "parameters": f"{description.parameters:,}",
        "bytes": f"{description.size:,}",
    }
    lines = [f"{name:<11}{value}" for name, value in fields.items()]
    if description.provenance:
        provenance = json.dumps(description.provenance, indent=2, sort_keys=True, ensure_ascii=False)
        lines += ["provenance", provenance]
    return lines


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
