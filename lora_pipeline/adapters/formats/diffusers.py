"""`pytorch_lora_weights.safetensors`: all that diffusers has written is read, what diffusers >= 0.35 writes is written.

Tensors: `<model>.` and the names in `parts`, model being `unet`, `text_encoder` or `text_encoder_2`; a UNet's may come
without. Ours, which diffusers passes over: `lora_pipeline.embedding.<token>`, and `lora_pipeline.embedding_2.<token>`
for SDXL's second encoder. Others that begin with a model are carried along.
Metadata: `lora_adapter_metadata`, JSON of PEFT's LoraConfig fields (see `lora_config`) prefixed by the model (`unet.r`,
`unet.lora_alpha`, ...); without it alpha = rank. And ours: `lora_pipeline` with the provenance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats.lora_config import LoraConfig, parse_config, render_config
from lora_pipeline.adapters.formats.parts import Parts, by_model, by_path, is_dora, named_parts, part_of
from lora_pipeline.adapters.formats.provenance import read_object, read_provenance, write_provenance
from lora_pipeline.adapters.targets import MODELS, UNET, model_of, published_name
from lora_pipeline.errors import CorruptError

CONFIG_KEY = "lora_adapter_metadata"
_OWN = ("format", CONFIG_KEY)
_EMBEDDING, _EMBEDDING_2 = "lora_pipeline.embedding.", "lora_pipeline.embedding_2."


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads the adapter out of a file's tensors and metadata.

    Raises:
        CorruptError: A key of no model, a factor without its other half, an adapter that is no plain LoRA or DoRA.
    """
    parts, foreign = Parts(), {}
    embeddings: dict[str, Tensor] = {}
    embeddings_2: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_EMBEDDING):
            embeddings[name.removeprefix(_EMBEDDING)] = tensor
        elif name.startswith(_EMBEDDING_2):
            embeddings_2[name.removeprefix(_EMBEDDING_2)] = tensor
        else:
            model, key = _split(name)
            if not parts.add(model, key, name, tensor):
                foreign[f"{model}.{key}"] = tensor
    configs = _configs(read_object(metadata, CONFIG_KEY))
    factors = parts.factors(configs)
    return Adapter(
        factors,
        embeddings=embeddings,
        embeddings_2=embeddings_2,
        provenance=read_provenance(metadata, _OWN),
        magnitudes=parts.magnitudes(factors, configs),
        foreign=foreign,
    )


def render(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of an adapter; `parse` gives the same adapter back.

    Raises:
        CorruptError: Magnitudes or foreign tensors that are not of this format.
    """
    for name in adapter.foreign:
        if name.partition(".")[0] not in MODELS or part_of(name) is not None:
            raise CorruptError(name, "is a tensor of another format", "convert to native, which carries it along")
    tensors = named_parts(adapter, published_name)
    tensors |= {_EMBEDDING + token: rows for token, rows in adapter.embeddings.items()}
    tensors |= {_EMBEDDING_2 + token: rows for token, rows in adapter.embeddings_2.items()}
    tensors |= adapter.foreign
    config: dict[str, Any] = {}
    for model, targets in by_model(adapter).items():
        fields = render_config(model, by_path(adapter, targets), is_dora(adapter, targets))
        config |= {f"{model}.{name}": value for name, value in fields.items()}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config, sort_keys=True)}
    return tensors, metadata | write_provenance(adapter.provenance, _OWN)


def _split(name: str) -> tuple[str, str]:
    """The model and the name below it; files of old training scripts are for a UNet and do not say so."""
    model, _, key = name.partition(".")
    if model in MODELS and key:
        return model, key
    if model_of(name) == UNET:
        return UNET, name
    fix = "give a LoRA of Stable Diffusion 1.x, 2.x or SDXL"
    raise CorruptError(name, "belongs to neither the UNet nor a text encoder", fix)


def _configs(document: Mapping[str, Any]) -> dict[str, LoraConfig]:
    """By model; a file that a UNet saved by itself names its fields without the model."""
    configs = {}
    for model in MODELS:
        start = f"{model}."
        fields = {name.removeprefix(start): value for name, value in document.items() if name.startswith(start)}
        if model == UNET:
            fields = {name: value for name, value in document.items() if "." not in name} | fields
        if fields:
            configs[model] = parse_config(model, fields)
    return configs
