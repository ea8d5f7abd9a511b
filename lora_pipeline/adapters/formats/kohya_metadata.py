"""The text metadata of kohya's format: what the user interfaces ask for, what the source said, and our provenance.

`ss_*` is what kohya's trainer records, `sshs_*` its hashes, `modelspec.*` Stability's specification. By
`ss_base_model_version` and `ss_v2` AUTOMATIC1111 tells the base. Our own key, `lora_pipeline`, holds the provenance as
sorted JSON, in which `source_metadata` is the list of the keys that the source file had: their texts are beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_pipeline.adapters.adapter import Adapter, Json
from lora_pipeline.adapters.topology import SD1, SD2, SDXL
from lora_pipeline.errors import CorruptError

PROVENANCE_KEY = "lora_pipeline"
SOURCE = "source_metadata"
_FAMILIES = {
    SD1: {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    },
    # which of its two architectures (512 or 768-v) shapes do not tell
    SD2: {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    SDXL: {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    },
}


def source_metadata(adapter: Adapter) -> dict[str, str]:
    """What the file an adapter was read from said about itself, text by text.

    Raises:
        CorruptError: The provenance holds something else under that name.
    """
    source = adapter.provenance.get(SOURCE, {})
    if not isinstance(source, Mapping) or not all(isinstance(text, str) for text in source.values()):
        raise CorruptError(SOURCE, "is not text by text", "make the adapter again from its source")
    return {str(key): str(text) for key, text in source.items() if key != PROVENANCE_KEY}


def says_sdxl(source: Mapping[str, str]) -> bool:
    """Whether a file says that it is for SDXL."""
    version, architecture = source.get("ss_base_model_version", ""), source.get("modelspec.architecture", "")
    return version.startswith("sdxl") or architecture.startswith("stable-diffusion-xl")


def facts(adapter: Adapter, family: str | None) -> dict[str, str]:
    """What the user interfaces ask for.

    Args:
        adapter: What is written.
        family: Of the base it is for, see `topology`; None if that is open.
    """
    ranks = {factors.rank for factors in adapter.factors.values()}
    alphas = {factors.alpha for factors in adapter.factors.values()}
    found = {} if family is None else dict(_FAMILIES[family])
    if ranks:
        found["ss_network_module"] = "networks.lora"
        found["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        found["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    return found


def metadata_of(adapter: Adapter, found: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata.

    Args:
        adapter: What is written.
        found: Its `facts`; the source's own words come first.
    """
    source = source_metadata(adapter)
    own: dict[str, Json] = {key: value for key, value in adapter.provenance.items() if key != SOURCE}
    metadata = {**found, **source}
    if own or not source or metadata != source:
        document = {**own, SOURCE: sorted(source)} if source else own
        metadata[PROVENANCE_KEY] = json.dumps(document, sort_keys=True, allow_nan=False)
    return metadata


def provenance_of(metadata: Mapping[str, str], found: Mapping[str, str]) -> dict[str, Json]:
    """The provenance of a file's adapter.

    Args:
        metadata: The file's.
        found: The `facts` of its adapter, which are the source's words only where it is listed as having said them.

    Raises:
        CorruptError: Our key holds something that we did not write.
    """
    ours = PROVENANCE_KEY in metadata
    provenance = _document(metadata) if ours else {}
    listed = provenance.pop(SOURCE, [])
    if not isinstance(listed, list):
        raise CorruptError(PROVENANCE_KEY, f"{SOURCE} is not a list", "get the file again")
    source = {
        key: text
        for key, text in metadata.items()
        if key != PROVENANCE_KEY and (not ours or key in listed or found.get(key) != text)
    }
    return {**provenance, SOURCE: source} if source else provenance


def _document(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        document = json.loads(metadata[PROVENANCE_KEY])
        json.dumps(document, allow_nan=False)  # Python reads NaN and 1e999, which are no JSON and could not be written
    except (ValueError, RecursionError) as error:
        raise CorruptError(PROVENANCE_KEY, f"cannot be read: {error!r:.100}", "get the file again") from None
    if not isinstance(document, dict):
        raise CorruptError(PROVENANCE_KEY, "is not an object", "get the file again")
    return document
