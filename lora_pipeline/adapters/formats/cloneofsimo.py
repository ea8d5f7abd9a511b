"""The safetensors format of cloneofsimo/lora, which knows layers by their position alone (see `positions`).

Tensors: `unet:<i>:up`, `unet:<i>:down`, `text_encoder:<i>:up`, `text_encoder:<i>:down`, and a vector under each token.
Metadata: `<model>` is a JSON list of the classes that were adapted, `<model>:<i>:rank`, and `<token>` is `<embed>`;
ours, which its reader passes over, is `lora_pipeline`: the provenance, which positions hold nothing (its reader wants
all of them), and how many vectors each token has (its reader knows one a token). There is no alpha: the change is
up · down, so another scale is folded into `up`, in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter, Json
from lora_pipeline.adapters.formats.provenance import KEY, SOURCE, read_object, write_provenance
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.positions import (
    CLIP_ATTENTION,
    LEGACY,
    MODERN,
    ORDERS,
    TEXT_LAYERS,
    UNET_CLASSES,
    text_targets,
    unet_targets,
)
from lora_pipeline.adapters.targets import TEXT_ENCODER, UNET, root
from lora_pipeline.adapters.topology import SD1, SD2, families, layers
from lora_pipeline.adapters.vocabulary import token_names
from lora_pipeline.errors import CorruptError

EMBED = "<embed>"
ORDER = "order"
_POSITION = re.compile(r"(unet|text_encoder):(0|[1-9]\d{0,3}):(up|down)")
_FIX = "get the file again"
_ELSEWHERE = "use --to native or --to diffusers, which write any name"


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads the adapter out of a file's tensors and metadata.

    Raises:
        CorruptError: Positions are missing, or the shapes at them are of neither SD 1.x nor SD 2.x.
    """
    ours = read_object(metadata, KEY)
    tokens = [name for name, text in metadata.items() if text == EMBED and name in tensors]
    by_position = {name: tensor for name, tensor in tensors.items() if _POSITION.fullmatch(name)}
    pairs = {model: _pairs(model, by_position) for model in (UNET, TEXT_ENCODER)}
    factors, order = _placed(pairs[UNET], pairs[TEXT_ENCODER])
    for target in _listed(ours, "empty"):
        factors.pop(target, None)
    provenance = _provenance(ours, metadata, tensors)
    if order == LEGACY:  # what is read in one order is written in the same
        provenance[ORDER] = order
    foreign = {name: tensor for name, tensor in tensors.items() if name not in by_position and name not in tokens}
    return Adapter(factors, _rows(tensors, tokens, ours.get("vectors", {})), provenance, foreign)


def render(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of an adapter; `parse` gives an adapter of the same changes back.

    Raises:
        CorruptError: A layer that has no position in this format, a DoRA, a second text encoder, foreign tensors.
    """
    _check_holds(adapter)
    order = LEGACY if adapter.provenance.get(ORDER) == LEGACY else MODERN
    family = _family(adapter.factors)
    parts = {UNET: _unet_part(adapter, order), TEXT_ENCODER: _text_part(adapter, family)}
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    empty: list[Json] = []
    for model, (targets, classes) in parts.items():
        for index, target in enumerate(targets):
            factors = adapter.factors.get(target)
            if factors is None:
                empty.append(target)
                factors = _nothing(layers(family)[target])
            factors = factors.shaped(len(layers(family)[target]))
            tensors[f"{model}:{index}:up"], tensors[f"{model}:{index}:down"] = _folded(factors), factors.down
            metadata[f"{model}:{index}:rank"] = str(factors.rank)
        if targets:
            metadata[model] = json.dumps(classes)
    vectors: dict[str, Json] = {}
    for token, rows in adapter.embeddings.items():
        names = token_names(token, len(rows))
        vectors[token] = len(rows)
        tensors |= dict(zip(names, rows, strict=True))
        metadata |= dict.fromkeys(names, EMBED)
    return tensors, _with_ours(adapter, metadata, {"empty": empty, "vectors": vectors})


@dataclass(frozen=True)
class _Pair:
    up: Tensor
    down: Tensor


def _pairs(model: str, tensors: Mapping[str, Tensor]) -> list[_Pair]:
    """The factors of one model in the order of positions, of which none may be missing."""
    count = sum(name.startswith(f"{model}:") for name in tensors)
    pairs = []
    for index in range((count + 1) // 2):
        up, down = tensors.get(f"{model}:{index}:up"), tensors.get(f"{model}:{index}:down")
        if up is None or down is None:
            missing = f"{model}:{index}:{'up' if up is None else 'down'}"
            raise CorruptError(missing, "is missing, and without it nothing stands at its place", _FIX)
        pairs.append(_Pair(up, down))
    return pairs


def _placed(unet: Sequence[_Pair], text: Sequence[_Pair]) -> tuple[dict[str, LoraFactors], str]:
    """Factors by target, and the order in which their shapes make sense."""
    classes = next((classes for classes in UNET_CLASSES if len(unet_targets(classes, MODERN)) == len(unet)), ())
    if unet and not classes:
        counts = ", ".join(str(len(unet_targets(each, MODERN))) for each in UNET_CLASSES)
        raise CorruptError(UNET, f"has {len(unet)} positions, where this format has one of {counts}", _FIX)
    if len(text) % 4:
        raise CorruptError(TEXT_ENCODER, f"has {len(text)} positions, which are not 4 a layer", _FIX)
    on_text = _factors(text_targets(len(text) // 4), text)
    for order in ORDERS:
        factors = _factors(unet_targets(classes, order), unet) | on_text
        if not factors or {SD1, SD2} & set(families(_changes(factors))):
            # without the feed-forward layers, both orders are one
            return factors, order if unet_targets(classes, LEGACY) != unet_targets(classes, MODERN) else MODERN
    problem = "the shapes at its positions are those of neither SD 1.x nor SD 2.x"
    raise CorruptError(UNET if unet else TEXT_ENCODER, problem, "give a file for SD 1.x or SD 2.x")


def _factors(targets: Sequence[str], pairs: Sequence[_Pair]) -> dict[str, LoraFactors]:
    found = {}
    for target, pair in zip(targets, pairs, strict=True):
        try:
            found[target] = LoraFactors(pair.down, pair.up, alpha=float(pair.down.shape[0]) if pair.down.ndim else 0.0)
        except CorruptError as error:
            raise CorruptError(target, error.problem, error.fix) from None
    return found


def _changes(factors: Mapping[str, LoraFactors]) -> dict[str, tuple[int, ...]]:
    return {target: (each.up.shape[0], *each.down.shape[1:]) for target, each in factors.items()}


def _rows(tensors: Mapping[str, Tensor], tokens: Sequence[str], vectors: Any) -> dict[str, Tensor]:
    """Rows by token; vectors that we wrote as tokens of their own come together again."""
    left = dict.fromkeys(tokens)
    joined = {}
    for token, count in vectors.items() if isinstance(vectors, dict) else ():
        names = token_names(token, count) if type(count) is int and 0 < count <= len(tokens) else []
        if names and all(name in left and tensors[name].ndim == 1 for name in names):
            joined[token] = torch.stack([tensors[name] for name in names])
            for name in names:
                del left[name]
    for token in left:
        rows = tensors[token]
        joined[token] = rows[None] if rows.ndim == 1 else rows
    return joined


def _provenance(ours: Mapping[str, Any], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Json]:
    provenance = ours.get("provenance", {})
    if not isinstance(provenance, dict):
        raise CorruptError(KEY, "the provenance is not an object", _FIX)
    written = {UNET, TEXT_ENCODER, KEY, *(f"{name.rpartition(':')[0]}:rank" for name in tensors if ":" in name)}
    texts = {key: text for key, text in metadata.items() if key not in written and text != EMBED}
    return {**provenance, SOURCE: texts} if texts else dict(provenance)


def _with_ours(adapter: Adapter, metadata: dict[str, str], document: dict[str, Json]) -> dict[str, str]:
    left = {key: value for key, value in adapter.provenance.items() if key != ORDER or value != LEGACY}
    texts = write_provenance(left, metadata)
    provenance = json.loads(texts.pop(KEY))
    told = {key: value for key, value in {**document, "provenance": provenance}.items() if value}
    if document["vectors"] == dict.fromkeys(adapter.embeddings, 1):
        told.pop("vectors", None)
    return {**texts, **metadata} | ({KEY: json.dumps(told, sort_keys=True, allow_nan=False)} if told else {})


def _listed(ours: Mapping[str, Any], key: str) -> list[str]:
    names = ours.get(key, [])
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _check_holds(adapter: Adapter) -> None:
    if adapter.magnitudes:
        fix = "make a plain adapter of it: lora-pipe convert IN OUT --base BASE"
        raise CorruptError(min(adapter.magnitudes), "is a DoRA's, which this format cannot hold", fix)
    if adapter.embeddings_2:
        raise CorruptError(min(adapter.embeddings_2), "is for a second text encoder, which SD 1.x lacks", _ELSEWHERE)
    if adapter.foreign:
        fix = "convert the adapter to the format it came from, or to native"
        raise CorruptError(min(adapter.foreign), "is a tensor of another format, which nobody here understands", fix)
    for token in adapter.embeddings:
        if ":" in token or token.startswith((UNET, TEXT_ENCODER)):
            raise CorruptError(token, "is a token that this format takes for a layer", _ELSEWHERE)


def _family(factors: Mapping[str, LoraFactors]) -> str:
    fitting = [name for name in (SD1, SD2) if not factors or name in families(_changes(factors))]
    if not fitting:
        raise CorruptError(min(factors), "or another layer is of neither SD 1.x nor SD 2.x", _ELSEWHERE)
    return fitting[0]


def _unet_part(adapter: Adapter, order: str) -> tuple[tuple[str, ...], list[str]]:
    wanted = {target for target in adapter.factors if target.startswith(root(UNET))}
    if not wanted:
        return (), []
    for classes in UNET_CLASSES:
        if wanted <= set(targets := unet_targets(classes, order)):
            # older diffusers called the class CrossAttention
            return targets, sorted({*classes, "CrossAttention"} if "Attention" in classes else classes)
    everything = {target for classes in UNET_CLASSES for target in unet_targets(classes, order)}
    raise CorruptError(min(wanted - everything), "has no place in this format", _ELSEWHERE)


def _text_part(adapter: Adapter, family: str) -> tuple[tuple[str, ...], list[str]]:
    wanted = {target for target in adapter.factors if target.startswith(root(TEXT_ENCODER))}
    targets = text_targets(TEXT_LAYERS[family])
    if wanted - set(targets):
        raise CorruptError(min(wanted - set(targets)), "has no place in this format", _ELSEWHERE)
    return (targets, [CLIP_ATTENTION]) if wanted else ((), [])


def _nothing(shape: tuple[int, ...]) -> LoraFactors:
    tail = [1] * (len(shape) - 2)
    return LoraFactors(torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *tail), alpha=1.0)


def _folded(factors: LoraFactors) -> Tensor:
    return factors.up if factors.scale == 1.0 else factors.up.float() * factors.scale
