"""`lora-pipe inspect`: what an adapter or a base is, from its headers alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_pipeline.adapters.description import BASES, Description, describe
from lora_pipeline.errors import CorruptError, printable

if TYPE_CHECKING:
    from lora_pipeline.adapters.anatomy import Anatomy

_LARGEST = 10


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter, a checkpoint, a PEFT folder or a diffusers folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    deep: Annotated[bool, typer.Option(help="Read an adapter's tensors too: norms, and the ranks they need.")] = False,
) -> None:
    """Show what an adapter changes, its ranks, its tokens and where it comes from.

    Examples:

        lora-pipe inspect models/adapters/zorp.safetensors

        lora-pipe inspect models/blends/zorp-sticker.safetensors --json

        lora-pipe inspect pytorch_lora_weights.safetensors --deep
    """
    description = describe(file)
    anatomy = _dissected(file) if deep else None
    try:
        typer.echo(_json(description, anatomy) if as_json else "\n".join(_lines(description, anatomy)))
    except RecursionError:
        raise CorruptError(str(file), "its metadata are nested too deep", "get the file again") from None


def _dissected(file: Path) -> Anatomy:
    from lora_pipeline.adapters import load_adapter
    from lora_pipeline.adapters.anatomy import dissect

    return dissect(load_adapter(file).factors)


def _json(description: Description, anatomy: Anatomy | None) -> str:
    document = dataclasses.asdict(description)
    if anatomy is not None:
        document["deep"] = dataclasses.asdict(anatomy)
    return json.dumps(document, indent=2, sort_keys=True)


def _lines(description: Description, anatomy: Anatomy | None) -> list[str]:
    fields = {
        "format": description.format,
        "family": description.family or "not told by its widths",
        **(_changes(description) if description.format not in BASES else {}),
        "dtypes": _listed(description.dtypes),
        "parameters": f"{description.parameters:,}",
        "bytes": f"{description.size:,}",
        **description.source,
    }
    width = max(len(name) for name in fields) + 2
    lines = [f"{name:<{width}}{printable(value)}" for name, value in fields.items()]
    lines += [f"{'sha256':<{width}}{digest} {printable(name)}" for name, digest in description.sha256.items()]
    if description.provenance:
        lines += ["provenance", json.dumps(description.provenance, indent=2, sort_keys=True)]
    return lines + (_told(anatomy) if anatomy is not None else [])


def _changes(description: Description) -> dict[str, str]:
    return {
        "kinds": _listed(description.kinds),
        "layers": _listed(description.layers),
        **{f"  {model}": _listed(parts) for model, parts in description.targets.items()},
        "ranks": _layers(description.ranks),
        "alphas": _layers(description.alphas) if description.alphas else "not in the header",
        "tokens": _listed(description.tokens),
    }


def _told(anatomy: Anatomy) -> list[str]:
    lines = [f"norm of the whole change: {anatomy.norm:.4g}"]
    lines += [f"  cut to rank {rank}: keeps {share:.2%} of it (squared)" for rank, share in anatomy.kept.items()]
    largest = sorted(anatomy.layers.items(), key=lambda item: -item[1].norm)[:_LARGEST]
    lines += [f"largest {len(largest)} of {len(anatomy.layers)} changes: norm, rank, rank needed for 99 %, alpha"]
    rows = [(f"{each.norm:.4g}", f"{each.rank}", f"{each.needed}", f"{each.alpha:g}", name) for name, each in largest]
    return lines + [f"  {norm:>10}{rank:>6}{needed:>6}{alpha:>8}  {name}" for norm, rank, needed, alpha, name in rows]


def _layers(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{value:g} ({count} layers)" for value, count in counts.items()) or "none"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
