"""What the file says once of every concept: `defaults`, which a concept's own values go before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS = "defaults"
SECTIONS = ("preprocess", "priors", "train", "extract")


def with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content without `defaults`, whose sections are in every concept that has a section of that name.

    Whatever has another form than it should stays as it is, for the schema to refuse.
    """
    defaults, concepts = content.get(DEFAULTS), content.get("concepts")
    rest = {key: value for key, value in content.items() if key != DEFAULTS}
    if not (isinstance(defaults, Mapping) and isinstance(concepts, Mapping)):
        return rest if isinstance(defaults, Mapping) else dict(content)
    known = {key: value for key, value in defaults.items() if key in SECTIONS}
    odd = {key: value for key, value in defaults.items() if key not in SECTIONS}
    merged = {
        name: {key: joined(known[key], value) if key in known else value for key, value in concept.items()}
        if isinstance(concept, Mapping)
        else concept
        for name, concept in concepts.items()
    }
    return rest | {"concepts": merged} | ({DEFAULTS: odd} if odd else {})


def joined(default: Any, own: Any) -> Any:
    """`own` over `default`; of two mappings every key of either."""
    if not (isinstance(default, Mapping) and isinstance(own, Mapping)):
        return own
    both = {key: joined(default[key], value) if key in default else value for key, value in own.items()}
    return {**default, **both}


def origin(content: Mapping[str, Any], keys: list[str]) -> list[str]:
    """Where a value of a concept stands in the file: in the concept itself, or in `defaults`."""
    if len(keys) < 4 or keys[0] != "concepts":
        return keys
    for start in (["concepts", keys[1]], [DEFAULTS]):
        if _has(content, [*start, *keys[2:]]):
            return [*start, *keys[2:]]
    return keys


def _has(content: Any, keys: list[str]) -> bool:
    for key in keys:
        if not (isinstance(content, Mapping) and key in content):
            return False
        content = content[key]
    return True
