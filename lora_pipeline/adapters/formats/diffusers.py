"""`pytorch_lora_weights.safetensors` with PEFT-style keys, as diffusers >= 0.35 writes and reads it.

Tensors: `<model>.<module path>.lora_A.weight` (down) and `.lora_B.weight` (up), model being `unet` or `text_encoder`;
and ours, which diffusers passes over: `lora_pipeline.embedding.<token>`.
Metadata: `lora_adapter_metadata`, JSON of PEFT's LoraConfig fields prefixed by the model (`unet.r`, `unet.lora_alpha`,
`unet.rank_pattern`, `unet.alpha_pattern`, ...); without it alpha = rank. And ours: `lora_pipeline` with the provenance.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import TEXT_ENCODER, UNET, module_path, root, target_of
from lora_pipeline.errors import CorruptError

CONFIG_KEY = "lora_adapter_metadata"
PROVENANCE_KEY = "lora_pipeline"
_EMBEDDING = "lora_pipeline.embedding."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save")


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads the adapter out of a file's tensors and metadata.

    Raises:
        CorruptError: A key that is none of this format's, a factor without its other half, a kind of adapter that is
            not a plain LoRA.
    """
    config = _parse_object(metadata, CONFIG_KEY)
    factors: dict[str, LoraFactors] = {}
    embeddings: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_EMBEDDING):
            embeddings[name.removeprefix(_EMBEDDING)] = tensor
        elif name.endswith(_DOWN):
            target, model, path = _split(name)
            up = tensors.get(name.removesuffix(_DOWN) + _UP)
            if up is None:
                raise CorruptError(name, "has no lora_B beside it", "get the file again")
            factors[target] = LoraFactors(tensor, up, _alpha(config, model, path, tensor.shape[0]))
        elif not name.endswith(_UP) or name.removesuffix(_UP) + _DOWN not in tensors:
            raise CorruptError(name, "is no key of a plain LoRA", "give an adapter with lora_A and lora_B only")
    return Adapter(factors, embeddings, _parse_object(metadata, PROVENANCE_KEY))


def render(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of an adapter; `parse` gives the same adapter back."""
    tensors = {target + _DOWN: factors.down for target, factors in adapter.factors.items()}
    tensors |= {target + _UP: factors.up for target, factors in adapter.factors.items()}
    tensors |= {_EMBEDDING + token: rows for token, rows in adapter.embeddings.items()}
    config = _config(UNET, "^", adapter) | _config(TEXT_ENCODER, "", adapter)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config, sort_keys=True)}
    metadata[PROVENANCE_KEY] = json.dumps(adapter.provenance, sort_keys=True, allow_nan=False)
    return tensors, metadata


def _config(model: str, anchor: str, adapter: Adapter) -> dict[str, Any]:
    """LoraConfig fields of one model: the commonest rank and alpha, and by module what differs.

    Text encoder paths go unanchored and without `text_model.`, to match live names with and without it.
    """
    factors = {module_path(name): each for name, each in adapter.factors.items() if name.startswith(root(model))}
    if not factors:
        return {}
    rank = _commonest(each.rank for each in factors.values())
    alpha = _commonest(each.alpha for each in factors.values())
    fields = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {anchor + path: each.rank for path, each in factors.items() if each.rank != rank},
        "alpha_pattern": {anchor + path: each.alpha for path, each in factors.items() if each.alpha != alpha},
        "target_modules": sorted(factors),
        "peft_type": "LORA",
    }
    return {f"{model}.{name}": value for name, value in fields.items()}


def _commonest(values: Any) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _split(name: str) -> tuple[str, str, str]:
    model, _, path = name.removesuffix(_DOWN).partition(".")
    if model not in (UNET, TEXT_ENCODER):
        raise CorruptError(name, "belongs to neither the unet nor the text_encoder", "give an SD 1.x or 2.x adapter")
    return target_of(model, path), model, path


def _alpha(config: Mapping[str, Any], model: str, path: str, rank: int) -> float:
    if not any(name.startswith(model + ".") for name in config):
        return float(rank)
    for name in _UNSUPPORTED:
        if config.get(f"{model}.{name}"):
            raise CorruptError(f"{model}.{name}", "is not a plain LoRA", "give an adapter without it")
    alpha = config.get(f"{model}.lora_alpha", 8)  # 8 is LoraConfig's own default
    for pattern, value in (config.get(f"{model}.alpha_pattern") or {}).items():
        if _matches(pattern, path):
            alpha = value
            break
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CorruptError(f"{model}.{path}", f"alpha is {alpha!r}", "get the file again")
    return float(alpha) * (math.sqrt(rank) if config.get(f"{model}.use_rslora") else 1.0)


def _matches(pattern: str, path: str) -> bool:
    """PEFT's rule, with dots taken literally: the whole path after `^`, otherwise any suffix of whole names."""
    anchored, wanted = pattern.startswith("^"), pattern.removeprefix("^")
    short, wanted = path.removeprefix("text_model."), wanted.removeprefix("text_model.")
    return re.fullmatch(("" if anchored else r"(.*\.)?") + re.escape(wanted), short) is not None


def _parse_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        document = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise CorruptError(key, f"the metadata cannot be read: {error!r:.100}", "get the file again") from None
    if not isinstance(document, dict):
        raise CorruptError(key, "the metadata is not an object", "get the file again")
    return document
