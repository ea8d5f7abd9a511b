"""What an adapter's metadata tells: ours, and that of the programs people train with. Needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_pipeline.adapters.keys import Module, Shapes
from lora_pipeline.adapters.kohya_names import token_of_key
from lora_pipeline.adapters.peft_folder import CONFIG_SUFFIX
from lora_pipeline.adapters.recognition import CLONEOFSIMO, EMBEDDINGS, KOHYA, NATIVE, PEFT

_OURS, _DIFFUSERS = "lora_pipeline", "lora_adapter_metadata"
_EMBEDDINGS = ("embedding.", "embedding_2.", "lora_pipeline.embedding.", "lora_pipeline.embedding_2.")
_ROWS = ("emb_params", "clip_l", "clip_g")  # rows whose token the file does not tell
# kohya's scripts write a hundred fields; these say what the file is.
_TELLING = (
    "modelspec.title", "modelspec.architecture", "modelspec.author", "modelspec.license", "modelspec.date",
    "modelspec.trigger_phrase", "ss_output_name", "ss_sd_model_name", "ss_base_model_version", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_resolution", "ss_num_train_images", "ss_epoch",
    "ss_steps", "ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_optimizer", "ss_seed",
    "ss_training_comment",
)  # fmt: skip
_LONGEST = 200
_LARGEST = 1e30  # of a number that is no nonsense
_TAGS = 5


def provenance(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Ours, without what other programs wrote (see `summary`); empty where there is none or it cannot be read."""
    document = parsed(metadata.get(_OURS, "{}"))
    found = document.get("provenance", document)
    return {key: value for key, value in found.items() if key != "source_metadata"} if isinstance(found, dict) else {}


def summary(metadata: Mapping[str, str]) -> dict[str, str]:
    """The telling fields of kohya's and Stability's metadata, shortened; the commonest tags; how many fields more."""
    found = {key: metadata[key][:_LONGEST] for key in _TELLING if metadata.get(key) not in (None, "", "None")}
    tags: Counter[str] = Counter()
    for folder in parsed(metadata.get("ss_tag_frequency", "{}")).values():
        counts = folder.items() if isinstance(folder, dict) else ()
        tags.update({tag.strip()[:_LONGEST]: count for tag, count in counts if type(count) is int})
    if tags:
        found["tags"] = ", ".join(f"{tag} ({count})" for tag, count in tags.most_common(_TAGS))
    more = [key for key in metadata if key.startswith(("ss_", "sshs_", "modelspec.")) and key not in found]
    return {**found, "further fields": str(len(more))} if more else found


def tokens(shapes: Shapes, metadata: Mapping[str, str], form: str) -> dict[str, int]:
    """Vectors by token; `*` where the file does not say the token."""
    found: dict[str, int] = {}
    for key, shape in shapes.items():
        token = _token(key, metadata, form)
        if token and shape:
            found[token] = shape[0] if len(shape) > 1 else 1
    return found


def alphas(metadata: Mapping[str, str], modules: Sequence[Module]) -> Counter[float]:
    """How many layers have each alpha, as far as metadata tell."""
    ours = parsed(metadata.get(_OURS, "{}")).get("alphas")
    if isinstance(ours, dict):
        return _numbers(ours.values())
    config = parsed(metadata.get(_DIFFUSERS, "{}"))
    counts: Counter[float] = Counter()
    for model, layers in Counter(module.model for module in modules).items():
        fields = {key.removeprefix(f"{model}."): value for key, value in config.items() if key.startswith(f"{model}.")}
        counts += _configured(fields or parsed(metadata.get(model + CONFIG_SUFFIX, "{}")), layers)
    return counts


def parsed(text: str) -> dict[str, Any]:
    """A JSON object; empty where the text is none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _token(key: str, metadata: Mapping[str, str], form: str) -> str | None:
    if form == KOHYA:
        bundled = token_of_key(key)
        return bundled[0] if bundled else None
    if form == CLONEOFSIMO:
        return key if metadata.get(key) == "<embed>" else None
    start = next((each for each in _EMBEDDINGS if key.startswith(each)), None)
    if start and (form in (NATIVE, PEFT) or start.startswith(_OURS)):
        return key.removeprefix(start)
    if form == EMBEDDINGS:
        return "*" if key.rpartition(".")[2] in _ROWS else key
    return None


def _configured(config: Mapping[str, Any], layers: int) -> Counter[float]:
    """One `lora_alpha`, and what differs from it."""
    patterns = config.get("alpha_pattern")
    counts = _numbers(patterns.values() if isinstance(patterns, dict) else ())
    common = max(0, layers - counts.total())
    return counts + Counter(dict.fromkeys(_numbers([config.get("lora_alpha")]), common))


def _numbers(values: Any) -> Counter[float]:
    return Counter(float(value) for value in values if type(value) in (int, float) and abs(value) < _LARGEST)
