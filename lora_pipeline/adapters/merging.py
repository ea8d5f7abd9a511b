"""Adapters folded into a base: a diffusers folder or a single file that needs nothing of ours any more.

W' = round(W + Σ weight · ΔW): all adapters are summed in float32 and rounded once. Adding them one by one in the
checkpoint's precision loses 45 % of a change of size 1e-4 in float16. Nothing is ever subtracted again: what undoes a
merge reads the base anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_pipeline.adapters.adapter import check_base, check_known
from lora_pipeline.adapters.checkpoints.destination import write_file, write_folder
from lora_pipeline.adapters.checkpoints.folder import write_json
from lora_pipeline.adapters.checkpoints.single_file import slots_for, slots_of_file
from lora_pipeline.adapters.checkpoints.torch_file import read_note
from lora_pipeline.adapters.checkpoints.torch_reader import read_contents
from lora_pipeline.adapters.composition import Part, joined_embeddings, parents
from lora_pipeline.adapters.fingerprint import base_fingerprint
from lora_pipeline.adapters.header import read_header
from lora_pipeline.adapters.merger import DTYPES_BY_NAME, Merger, TokenRows
from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2
from lora_pipeline.adapters.vocabulary import token_names, with_tokens
from lora_pipeline.adapters.weights import open_weights, places_of_all
from lora_pipeline.errors import CorruptError, MissingError, ParamsError, UsageError

PROVENANCE = "lora_pipeline.json"
METADATA_KEY = "lora_pipeline_merge"
SINGLE_FILES = {".safetensors", ".ckpt"}
_TOKENIZERS = {TEXT_ENCODER: "tokenizer", TEXT_ENCODER_2: "tokenizer_2"}


def merge(
    base: Path, parts: Sequence[Part], out: Path, dtype: str | None, *, like: Path | None = None, tokens: bool = True
) -> None:
    """Writes a base with adapters and their tokens folded in, holding one tensor in memory at a time.

    Tensors that no adapter touches keep their bytes unless the dtype changes. A folder's other files are copied byte
    for byte; other forms of its weights (`.bin`, `.fp16.safetensors`) are left out, being the base's still.

    Args:
        base: A diffusers folder, or a single-file checkpoint (.safetensors or .ckpt) of SD1.x, SD2.x or SDXL.
        parts: (name, adapter, weight) each; without any, and without a dtype, the base is only converted.
        out: What to write: a single file if it ends in .safetensors or .ckpt, else a folder.
        dtype: `float16`, `bfloat16` or `float32` for the UNet and the text encoders; None keeps the base's.
        like: Where a folder is made of a single file: a folder of the same family, for its configs and its tokenizer.
        tokens: Whether the adapters' tokens are written too; a single file has no tokenizer to write them into.

    Raises:
        CorruptError: An adapter of another base, a change too large for the dtype, or a base of unknown names.
        ParamsError: An unknown dtype, or a token that the base or two adapters use already.
        UsageError: `like` is missing, or there are tokens for a single file.
        MissingError, ResourceError: See `weight_files` and `disk_errors`.
    """
    if dtype is not None and dtype not in DTYPES_BY_NAME:
        raise ParamsError("dtype", f"{dtype!r} is unknown", f"use one of {', '.join(DTYPES_BY_NAME)}")
    note = _note(base) if not parts and dtype is None else None
    for name, adapter, _ in parts:
        check_known(name, adapter)
    document: dict[str, Any] | None = None
    if parts or dtype is not None:
        fingerprint = base_fingerprint(base)
        for name, adapter, _ in parts:
            check_base(name, adapter, fingerprint)
        document = {"base": fingerprint, "dtype": dtype, "kind": "merged", "parents": parents(parts), "tokens": {}}
    single = out.suffix in SINGLE_FILES
    template = None if single else _template(base, like)
    places = open_weights(base).places if base.is_dir() and template is not None else places_of_all(base)
    rows, vocabularies, told = _tokens(parts if tokens else [], template, places)
    if document is not None:
        note = json.dumps(document | {"tokens": told}, sort_keys=True)
    merger = Merger(places, parts, rows, DTYPES_BY_NAME[dtype] if dtype else None)
    merger.check()
    if template is None:
        slots = slots_of_file(read_contents(base).tensors) if base.is_file() else slots_for(places)
        write_file(out, merger, slots, _metadata(base, note), note)
        return
    write_folder(template, out, merger, vocabularies, converting=base.is_file())
    if note is not None:
        write_json(out / PROVENANCE, json.loads(note))


def convert_checkpoint(base: Path, out: Path, *, like: Path | None = None) -> None:
    """A folder as a single file, or a single file as a folder; see `merge` for the arguments and errors."""
    merge(base, [], out, None, like=like)


def undo(merged: Path, base: Path, out: Path, *, like: Path | None = None) -> None:
    """Writes the base that something was merged into, streamed from that base itself, so that no rounding is left.

    Args:
        merged: A folder, .safetensors or .ckpt that `merge` wrote.
        base: What it was made of.
        out: See `merge`.
        like: See `merge`.

    Raises:
        MissingError: `merged` does not say what it was made of.
        CorruptError: `base` is another one than it says.
    """
    note = _note(merged)
    try:
        document = json.loads(note) if note is not None else {}
        recorded = document.get("base") if document.get("kind") == "merged" else None
    except (ValueError, AttributeError, RecursionError):
        recorded = None
    if not isinstance(recorded, str):
        fix = "take the base itself: a merge is undone by reading its base again"
        raise MissingError(str(merged), "does not say which base it was merged from", fix)
    found = base_fingerprint(base)
    if found != recorded:
        problem = f"has fingerprint {found[:12]}, {merged} was made from {recorded[:12]}"
        raise CorruptError(str(base), problem, "give the base that was merged")
    convert_checkpoint(base, out, like=like)


def _template(base: Path, like: Path | None) -> Path:
    if base.is_dir():
        return base
    if like is None:
        problem = "is a single file, which has no configs and no tokenizer to make a folder of"
        raise UsageError(str(base), problem, "name a diffusers folder of the same family with --like")
    return like


def _tokens(
    parts: Sequence[Part], template: Path | None, places: Mapping[str, Any]
) -> tuple[dict[str, TokenRows], dict[Path, str], dict[str, list[str]]]:
    """The rows of each text encoder, the tokenizers' files that change, and the names each token gets."""
    second = any(name.startswith(f"{TEXT_ENCODER_2}.") for name in places)
    embeddings = {TEXT_ENCODER: dict(sorted(joined_embeddings(parts).items()))}
    of_second = [(name, replace(adapter, embeddings=adapter.embeddings_2), weight) for name, adapter, weight in parts]
    embeddings[TEXT_ENCODER_2] = dict(sorted(joined_embeddings(of_second).items()))
    told = {token: token_names(token, len(each)) for token, each in embeddings[TEXT_ENCODER].items()}
    of_both = {token: token_names(token, len(each)) for token, each in embeddings[TEXT_ENCODER_2].items()}
    if of_both != (told if second else {}):
        token = min(told.keys() ^ of_both.keys(), default=min([*told, *of_both]))
        problem = f"has rows for {'one' if second else 'two'} text encoders, the base has {1 + second}"
        raise CorruptError(token, problem, "use an adapter of the base's family")
    if told and template is None:
        fix = "write it as an embedding file (lora-pipe convert), and merge with --without-tokens"
        raise UsageError(min(told), "is a token, and a single file has no tokenizer to hold it", fix)
    rows: dict[str, TokenRows] = {}
    files: dict[Path, str] = {}
    names = [name for each in told.values() for name in each]
    for model, tokenizer in _TOKENIZERS.items():
        if template is not None and names and (model == TEXT_ENCODER or second):
            first, changed = with_tokens(template / tokenizer, names)
            rows[model] = TokenRows.of(embeddings[model], first)
            files |= {Path(tokenizer) / name: text for name, text in changed.items()}
    return rows, files, told


def _note(checkpoint: Path) -> str | None:
    """What `merge` wrote about a folder or a single file; None where it did not."""
    if checkpoint.suffix == ".ckpt" and not checkpoint.is_dir():
        return read_note(checkpoint)
    if not checkpoint.is_dir():
        return read_header(checkpoint).metadata.get(METADATA_KEY)
    file = checkpoint / PROVENANCE
    return file.read_text("utf-8", "replace") if file.is_file() else None


def _metadata(base: Path, note: str | None) -> dict[str, str]:
    kept = (read_contents(base).metadata if base.is_file() else {}) or {"format": "pt"}
    return kept if note is None else {**kept, METADATA_KEY: note}
