"""`lora-pipe convert`: an adapter in another program's format, or a full model as a folder or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_pipeline.errors import UsageError
from stages._model_out import check_replaceable
from stages._rank_rule import rule_of
from stages._stage import stage

# The forms of full models, and how their names end.
MODELS = {"folder": None, "single": ".safetensors", "ckpt": ".ckpt"}

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Adapter
    from lora_pipeline.adapters.extraction import Extraction
    from lora_pipeline.adapters.weights import Weights


def convert(  # noqa: PLR0913 - the options of a command
    source: Annotated[Path, typer.Argument(metavar="IN", help="An adapter of any known format, or a full model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What to write.")],
    to: Annotated[
        str,
        typer.Option(help="native, diffusers, peft, kohya, cloneofsimo, ...; of full models folder, single or ckpt."),
    ] = "native",
    like: Annotated[
        Path | None, typer.Option(help="Single file to folder: a folder of the same family, for its configs.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base a DoRA was made for, to make it plain with.")] = None,
    rank: Annotated[int | None, typer.Option(help="Keep this rank in every layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of each layer's energy, as 0.95.")] = None,
    error: Annotated[float | None, typer.Option(help="Lose no more than this of each layer, as 0.1.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; default as it is.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open .pt, .bin and .ckpt files too, by torch's weights-only reader.")
    ] = False,
) -> None:
    """Write an adapter in another format: the same numbers, alphas and tokens, unless a rank or a dtype is asked for.

    Full models go between diffusers folders and single files; what they hold stays byte for byte.

    Examples:

        lora-pipe convert zorp.safetensors pytorch_lora_weights.safetensors --to diffusers

        lora-pipe convert locon.safetensors small.safetensors --to native --error 0.05 --dtype float16

        lora-pipe convert v1-5.ckpt v1-5 --to folder --like stable-diffusion-v1-4
    """
    from lora_pipeline.adapters import formats, load_adapter
    from lora_pipeline.adapters.conversion import convert as converted
    from lora_pipeline.adapters.peft_folder import is_peft_folder

    if to not in formats.WRITERS and to not in MODELS:
        known = ", ".join([*formats.WRITERS, *MODELS])
        raise UsageError("--to", f"{to!r} is no format that is written", f"use one of {known}")
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(str(out), "is what is read", "give another name to write to")
    if to in MODELS:
        if base or rank or energy or error:
            raise UsageError("convert", "has --base, --rank, --energy and --error for adapters", "leave them out")
        convert_model(source, out, to, like, dtype)
        return
    if like is not None:
        raise UsageError("--like", f"is for --to {' and '.join(MODELS)}", "leave it out")
    if out.is_dir() and not is_peft_folder(out):
        raise UsageError(str(out), "is a folder that holds something else", f"write to {out / source.name}")
    rule = rule_of({"rank": rank, "energy": energy, "error": error}, None)
    settings = {"dtype": dtype, "rank": rank, "energy": energy, "error": error, "to": to}
    inputs = [source, base] if base else [source]
    with stage("convert", out.name, out=out, inputs=inputs, section=lambda: settings) as run:
        adapter = load_adapter(source, allow_pickle=allow_pickle)
        weights = _weights(source, adapter, base) if base else None
        conversion = converted(str(source), adapter, base=weights, rule=rule, dtype=dtype)
        formats.save(conversion.adapter, run.building, to)
    typer.echo("\n".join([_written(source, out, to, conversion.adapter), *_approximated(conversion)]))


def convert_model(source: Path, out: Path, to: str, like: Path | None, dtype: str | None) -> None:
    """A full model in another form.

    Raises:
        UsageError: A name that does not go with the form.
    """
    from lora_pipeline.adapters.merging import SINGLE_FILES, merge

    suffix = MODELS[to]
    if (out.suffix if suffix or out.suffix in SINGLE_FILES else None) != suffix:
        fix = f"give a name that ends in {suffix}" if suffix else "give a name without that ending"
        raise UsageError(str(out), f"is no name for --to {to}", fix)
    check_replaceable(out, source, suffix is not None)
    inputs = [source, like] if like else [source]
    with stage("convert", out.name, out=out, inputs=inputs, section=lambda: {"dtype": dtype, "to": to}) as run:
        merge(source, [], run.building, dtype, like=like)
    typer.echo(f"{source} → {out} ({to})")


def _weights(source: Path, adapter: Adapter, base: Path) -> Weights:
    from lora_pipeline.adapters.adapter import check_base
    from lora_pipeline.adapters.fingerprint import base_fingerprint
    from lora_pipeline.adapters.weights import open_weights

    check_base(str(source), adapter, base_fingerprint(base))
    return open_weights(base)


def _written(source: Path, out: Path, to: str, adapter: Adapter) -> str:
    from lora_pipeline.adapters.description import describe
    from lora_pipeline.adapters.header import is_pickle

    form = "pickle" if is_pickle(source) else describe(source).format
    tokens = sorted({*adapter.embeddings, *adapter.embeddings_2})
    facts = [
        f"{len(adapter.factors)} layer{'' if len(adapter.factors) == 1 else 's'}",
        f"tokens {', '.join(tokens)}" if tokens else "no tokens",
    ]
    if adapter.magnitudes:
        facts.append(f"{len(adapter.magnitudes)} of them DoRA")
    if adapter.foreign:
        facts.append(f"{len(adapter.foreign)} foreign tensors carried along")
    return f"{source} ({form}) → {out} ({to}): {', '.join(facts)}"


def _approximated(conversion: Extraction) -> list[str]:
    if not conversion.layers:
        return []
    worst = max(conversion.layers, key=lambda target: conversion.layers[target].residual)
    return [
        f"what is left out: {conversion.residual:.3%} of the whole change (Frobenius norm),"
        f" at most {conversion.layers[worst].residual:.3%} of a layer's ({worst})"
    ]
