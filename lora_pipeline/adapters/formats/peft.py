"""A PEFT folder, as `PeftModel.save_pretrained` writes it and `PeftModel.from_pretrained` reads it.

`parse` and `render` see it as one file, see `peft_folder`: tensors `<model>.base_model.model.` and the names in
`parts`, `embedding.<token>`, `embedding_2.<token>`; metadata `<model>.adapter_config`, JSON of PEFT's LoraConfig fields
(see `lora_config`), and ours, `lora_pipeline` with the provenance. A folder for a UNet alone has no sub-folders.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter, Json
from lora_pipeline.adapters.formats.lora_config import parse_config, render_config
from lora_pipeline.adapters.formats.parts import Parts, by_model, by_path, is_dora, named_parts, part_of
from lora_pipeline.adapters.formats.provenance import read_object, read_provenance, write_provenance
from lora_pipeline.adapters.peft_folder import (
    BASE_MODEL,
    CONFIG,
    CONFIG_SUFFIX,
    EMBEDDINGS,
    WEIGHTS,
    read_configs,
    weight_files,
)
from lora_pipeline.adapters.storage import disk_errors, read_tensors, write_tensors
from lora_pipeline.adapters.targets import MODELS, TEXT_ENCODER, UNET, module_path, published_name
from lora_pipeline.errors import CorruptError

_OWN = ("format", *(model + CONFIG_SUFFIX for model in MODELS))
_EMBEDDING, _EMBEDDING_2 = "embedding.", "embedding_2."
# Fields that change nothing and say something: they are kept with the provenance and written again.
_KEPT = ("base_model_name_or_path", "revision", "task_type")


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads the adapter out of a folder's tensors and metadata.

    Raises:
        CorruptError: A missing configuration, a factor without its other half, an adapter that is no plain LoRA or
            DoRA of layers.
    """
    parts, foreign = Parts(), {}
    embeddings: dict[str, Tensor] = {}
    embeddings_2: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        model, _, key = name.partition(".")
        if model in EMBEDDINGS:
            rows = tensor[None] if tensor.ndim == 1 else tensor  # diffusers saves a single vector as (dim,)
            (embeddings if name.startswith(_EMBEDDING) else embeddings_2)[key] = rows
        elif model not in MODELS or model + CONFIG_SUFFIX not in metadata:
            raise CorruptError(name, f"cannot be understood without {CONFIG}", "give the folder that holds them both")
        elif ".lora_embedding_" in key:
            fix = "train the tokens by textual inversion instead"
            raise CorruptError(name, "is a low-rank change of a token table, which is no layer", fix)
        elif not parts.add(model, key.removeprefix(BASE_MODEL), name, tensor):
            foreign[name] = tensor
    documents = {m: read_object(metadata, m + CONFIG_SUFFIX) for m in MODELS if m + CONFIG_SUFFIX in metadata}
    configs = {model: parse_config(model + CONFIG_SUFFIX, document) for model, document in documents.items()}
    factors = parts.factors(configs)
    return Adapter(
        factors,
        embeddings=embeddings,
        embeddings_2=embeddings_2,
        provenance=_with_kept(read_provenance(metadata, _OWN), documents),
        magnitudes=parts.magnitudes(factors, configs),
        foreign=foreign,
    )


def render(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of an adapter's folder; `parse` gives the same adapter back.

    Raises:
        CorruptError: Magnitudes or foreign tensors that are not of this format.
    """
    models = by_model(adapter)
    for name in adapter.foreign:
        model, _, key = name.partition(".")
        if model not in models or not key.startswith(BASE_MODEL) or part_of(name) is not None:
            raise CorruptError(name, "is a tensor of another format", "convert to native, which carries it along")
    tensors = named_parts(adapter, _spelled)
    tensors |= {_EMBEDDING + token: rows for token, rows in adapter.embeddings.items()}
    tensors |= {_EMBEDDING_2 + token: rows for token, rows in adapter.embeddings_2.items()}
    tensors |= adapter.foreign
    metadata = {"format": "pt", **write_provenance(adapter.provenance, _OWN)}
    for model, targets in models.items():
        fields = render_config(model, by_path(adapter, targets), is_dora(adapter, targets))
        fields = {**_kept(adapter.provenance, model), **fields, "bias": "none", "inference_mode": True}
        metadata[model + CONFIG_SUFFIX] = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    return tensors, metadata


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A folder's tensors and metadata, as `parse` takes them.

    Raises:
        CorruptError, MissingError: See `weight_files`, `read_configs` and `read_tensors`.
    """
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for prefix, path in files.items():
        own, texts = read_tensors(path)
        tensors |= {f"{prefix}.{key}": tensor for key, tensor in own.items()}
        metadata |= texts
    return tensors, metadata | read_configs(files)


def write_folder(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a folder of what `render` gives, whole or not at all.

    Raises:
        CorruptError: There is something else of that name.
        ResourceError: No space left; an older folder of that name stays as it was.
    """
    _refuse_others(folder)
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{state}") for state in ("partial", "old"))
    with disk_errors(folder):
        try:
            _write(partial, tensors, metadata)
            if folder.is_dir():
                folder.rename(old)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if old.is_dir() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    texts = {key: text for key, text in metadata.items() if not key.endswith(CONFIG_SUFFIX)}
    models = [model for model in MODELS if model + CONFIG_SUFFIX in metadata]
    for model in models:
        place = folder if models == [UNET] else folder / model
        write_tensors(place / WEIGHTS, _below(model, tensors), texts)
        (place / CONFIG).write_text(metadata[model + CONFIG_SUFFIX], "utf-8")
    for prefix, name in EMBEDDINGS.items():
        rows = _below(prefix, tensors)
        if rows or (not models and prefix == "embedding"):  # something must carry the provenance
            write_tensors(folder / name, rows, texts)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _spelled(target: str) -> str:
    """PEFT wants the live names: since transformers 5 a CLIPTextModel has no `text_model`, its projecting kind does."""
    model, _, path = published_name(target).partition(".")
    return f"{model}.{BASE_MODEL}{module_path(target) if model == TEXT_ENCODER else path}"


def _refuse_others(folder: Path) -> None:
    """Only a folder of ours, or an empty one, is written over: nobody's other files go with it."""
    names = {CONFIG, WEIGHTS, *EMBEDDINGS.values()}
    files = [path for path in folder.rglob("*") if not path.is_dir()] if folder.is_dir() else [folder]
    if folder.exists() and any(path.name not in names for path in files):
        raise CorruptError(str(folder), "is there already and holds more than an adapter", "give another name")


def _with_kept(provenance: dict[str, Json], documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Json]:
    kept: dict[str, Json] = {}
    for model, document in documents.items():
        fields = {name: document[name] for name in _KEPT if isinstance(document.get(name), str)}
        if fields:
            kept[model + CONFIG_SUFFIX] = json.dumps(fields, sort_keys=True)
    told = provenance.get("source_metadata")
    return (
        {**provenance, "source_metadata": {**(told if isinstance(told, Mapping) else {}), **kept}}
        if kept
        else provenance
    )


def _kept(provenance: Mapping[str, Json], model: str) -> dict[str, Any]:
    told = provenance.get("source_metadata")
    text = told.get(model + CONFIG_SUFFIX) if isinstance(told, Mapping) else None
    if not isinstance(text, str):
        return {}
    fields = read_object({model: text}, model)
    return {name: value for name, value in fields.items() if name in _KEPT and isinstance(value, str)}
