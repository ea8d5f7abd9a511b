"""Adapters folded into a base: a diffusers folder that needs nothing of ours any more.

W' = round(W + Σ weight · ΔW): all adapters are summed in float32 and rounded once. Adding them one by one in the
checkpoint's precision loses 45 % of a change of size 1e-4 in float16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import check_base, check_family, check_understood
from lora_pipeline.adapters.composition import Part, joined_embeddings, parents, summed
from lora_pipeline.adapters.fingerprint import TEXT_ENCODER_WEIGHTS, UNET_WEIGHTS, base_fingerprint, weight_files
from lora_pipeline.adapters.header import TensorEntry, read_header
from lora_pipeline.adapters.lora import fitted
from lora_pipeline.adapters.storage import DTYPE_NAMES, DTYPES, disk_errors, read_tensor, stream_tensors
from lora_pipeline.adapters.targets import TEXT_ENCODER, UNET, root, target_of
from lora_pipeline.adapters.vocabulary import token_names, with_tokens
from lora_pipeline.adapters.weights import open_weights
from lora_pipeline.errors import CorruptError, ParamsError

PROVENANCE = "lora_pipeline.json"
_COMPONENTS = {UNET: UNET_WEIGHTS, TEXT_ENCODER: TEXT_ENCODER_WEIGHTS}
_TOKEN_TABLE = "text_encoder.text_model.embeddings.token_embedding"
_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".onnx"}


def merge(base: Path, parts: Sequence[Part], out: Path, dtype: str | None) -> None:
    """Writes a base with adapters and their tokens folded in, holding one tensor in memory at a time.

    Tensors that no adapter touches keep their bytes unless the dtype changes. Other files are copied byte for byte;
    other forms of the merged components' weights (`.bin`, `.fp16.safetensors`) are left out, being the base's still.

    Args:
        base: A diffusers folder.
        parts: (name, adapter, weight) each.
        out: The folder to write; it is made if it is not there.
        dtype: `float16`, `bfloat16` or `float32` for the UNet and the text encoder; None keeps the base's.

    Raises:
        CorruptError: An adapter of another base, or a change too large for the dtype.
        ParamsError: An unknown dtype, or a token that the base or two adapters use already.
        MissingError, ResourceError: See `weight_files` and `disk_errors`.
    """
    if dtype is not None and dtype not in _PRECISIONS:
        raise ParamsError("dtype", f"{dtype!r} is unknown", f"use one of {', '.join(_PRECISIONS)}")
    fingerprint = base_fingerprint(base)
    shapes = open_weights(base).shapes()
    for name, adapter, _ in parts:
        check_base(name, adapter, fingerprint)
        check_family(name, adapter, shapes)
        check_understood(name, adapter)
    embeddings = dict(sorted(joined_embeddings(parts).items()))
    names = [name for token, rows in embeddings.items() for name in token_names(token, len(rows))]
    first, vocabulary = with_tokens(base / "tokenizer", names) if names else (0, {})
    rows = torch.cat(list(embeddings.values())).float() if names else None
    merger = _Merger(parts, rows, first, _PRECISIONS[dtype] if dtype else None)
    files = {prefix: weight_files(base, name) for prefix, name in _COMPONENTS.items()}
    merger.check(files)
    with disk_errors(out):
        _copy_others(base, out)
        for name, text in vocabulary.items():
            (out / "tokenizer" / name).write_text(text, "utf-8")
    for prefix, shards in files.items():
        written = sum(merger.write(prefix, shard, out / shard.relative_to(base)) for shard in shards)
        _correct_index(out / f"{_COMPONENTS[prefix]}.index.json", written)
    _correct_config(out / "text_encoder" / "config.json", merger)
    document = {
        "base": fingerprint,
        "dtype": dtype,
        "kind": "merged",
        "parents": parents(parts),
        "tokens": {token: token_names(token, len(each)) for token, each in embeddings.items()},
    }
    _write_json(out / PROVENANCE, document)


@dataclass
class _Merger:
    """What becomes of each tensor.

    Args:
        parts: The adapters.
        rows: (vectors, dim) float32 of all new tokens.
        first: The id of the first of them.
        dtype: For all floating-point tensors; None keeps theirs.
        vocabulary: How many rows the token table ends up with; 0 until it is known.
    """

    parts: Sequence[Part]
    rows: Tensor | None
    first: int
    dtype: torch.dtype | None
    vocabulary: int = 0

    def check(self, files: dict[str, list[Path]]) -> None:
        """Refuses targets and rows that do not fit, before anything is written."""
        targets = {target for _, adapter, _ in self.parts for target in adapter.factors}
        for prefix, shards in files.items():
            entries = {
                _target(prefix, key): entry for shard in shards for key, entry in read_header(shard).tensors.items()
            }
            for target in sorted(target for target in targets if target.startswith(root(prefix))):
                if target not in entries:
                    raise CorruptError(target, "is no layer of this base", "use the base this adapter was trained on")
                fitted(target, summed(target, self.parts), entries[target].shape)
            if self.rows is not None and prefix == TEXT_ENCODER:
                if _TOKEN_TABLE not in entries:
                    raise CorruptError(_TOKEN_TABLE, "is missing from this base", "get the base again")
                self._check_rows(entries[_TOKEN_TABLE].shape, self.rows)

    def _check_rows(self, table: tuple[int, ...], rows: Tensor) -> None:
        if rows.shape[1] != table[1]:
            problem = f"token rows are {rows.shape[1]} wide, the base's are {table[1]}"
            raise CorruptError("embeddings", problem, "use the base this adapter was trained on")
        self.vocabulary = max(table[0], self.first + rows.shape[0])

    def write(self, prefix: str, source: Path, out: Path) -> int:
        """Writes one weight file; returns how many bytes of tensors it holds."""
        header = read_header(source)
        layout = {key: self._layout(_target(prefix, key), entry) for key, entry in header.tensors.items()}
        with source.open("rb") as file:

            def produce(key: str) -> Tensor:
                tensor = read_tensor(file, header.tensors[key])
                return self._merged(_target(prefix, key), tensor)

            stream_tensors(out, layout, header.metadata, produce)
        return sum(entry.stop - entry.start for entry in read_header(out).tensors.values())

    def _layout(self, target: str, entry: TensorEntry) -> tuple[str, tuple[int, ...]]:
        shape = (self.vocabulary, entry.shape[1]) if target == _TOKEN_TABLE and self.vocabulary else entry.shape
        return DTYPE_NAMES[self._dtype(DTYPES[entry.dtype])], shape

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _merged(self, target: str, tensor: Tensor) -> Tensor:
        dtype = self._dtype(tensor.dtype)
        if any(target in adapter.factors for _, adapter, _ in self.parts):
            change = fitted(target, summed(target, self.parts), tuple(tensor.shape)).delta()
            merged = (tensor.float() + change).to(dtype)
        elif target == _TOKEN_TABLE and self.rows is not None:
            merged = torch.zeros(self.vocabulary, tensor.shape[1], dtype=dtype)
            merged[: tensor.shape[0]] = tensor
            merged[self.first : self.first + self.rows.shape[0]] = self.rows
        else:
            merged = tensor.to(dtype)
        if merged is not tensor and merged.is_floating_point() and not bool(torch.isfinite(merged).all()):
            raise CorruptError(
                target, f"is beyond the range of {dtype}", "merge with dtype float32, or smaller weights"
            )
        return merged


def _target(prefix: str, key: str) -> str:
    return target_of(prefix, key.removesuffix(".weight"))


def _copy_others(base: Path, out: Path) -> None:
    for source in sorted(base.rglob("*")):
        path = source.relative_to(base)
        merged_component = len(path.parts) == 1 or path.parts[0] in _COMPONENTS
        if source.is_file() and not (merged_component and source.suffix in _WEIGHTS):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / path)


def _correct_index(index: Path, size: int) -> None:
    if index.is_file():
        document = json.loads(index.read_text("utf-8"))
        document["metadata"] = {**document.get("metadata", {}), "total_size": size}
        _write_json(index, document)


def _correct_config(config: Path, merger: _Merger) -> None:
    """Tells the config too: transformers believes it over the file about the vocabulary and the dtype."""
    changes: dict[str, Any] = {"vocab_size": merger.vocabulary} if merger.vocabulary else {}
    document = json.loads(config.read_text("utf-8"))
    if merger.dtype is not None:
        changes["torch_dtype" if "torch_dtype" in document else "dtype"] = str(merger.dtype).removeprefix("torch.")
    if changes:
        _write_json(config, document | changes)


def _write_json(path: Path, document: object) -> None:
    with disk_errors(path):
        path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")
