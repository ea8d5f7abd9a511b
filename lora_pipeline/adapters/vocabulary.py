"""Placeholder tokens in the tokenizer folder of a base, so that a merged checkpoint needs no adapter to know them.

A token of several vectors becomes several tokens, `<zorp>`, `<zorp>_1`, ...: tokenizers cannot make one word many.
diffusers' pipelines write them out by themselves; elsewhere the prompt must name them all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_pipeline.errors import CorruptError, MissingError, ParamsError

TOKENIZER = "tokenizer.json"
VOCABULARY = "vocab.json"
ADDED = "added_tokens.json"


def token_names(token: str, vectors: int) -> list[str]:
    """The tokenizer's tokens of a placeholder: `<zorp>`, `<zorp>_1`, ..."""
    return [token, *(f"{token}_{index}" for index in range(1, vectors))]


def with_tokens(tokenizer: Path, names: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Adds tokens to a tokenizer, in `tokenizer.json` or beside `vocab.json`, whichever there is.

    Args:
        tokenizer: The folder; nothing in it is changed.
        names: The new tokens.

    Returns:
        The id of the first of them (the others follow), and the new text of each file that changes.

    Raises:
        ParamsError: One of them is a token already.
        MissingError: Neither file is there.
        CorruptError: One of them cannot be read.
    """
    documents = _documents(tokenizer)
    known = _known_ids(tokenizer, documents)
    lowered = {word.lower() for word in known}
    for name in names:
        if {name.lower(), f"{name.lower()}</w>"} & lowered:
            fix = "train with another placeholder_token"
            raise ParamsError(name, "is a token of this base, or of another adapter, already", fix)
        lowered.add(name.lower())
    first = max(known.values()) + 1
    ids = {name: first + index for index, name in enumerate(names)}
    changed: dict[str, Any] = {}
    if TOKENIZER in documents:
        document = documents[TOKENIZER]
        document["added_tokens"] = document["added_tokens"] + [_added(name, index) for name, index in ids.items()]
        changed[TOKENIZER] = document
    if VOCABULARY in documents:
        changed[ADDED] = {**documents.get(ADDED, {}), **ids}
    return first, {name: json.dumps(each, indent=2, ensure_ascii=False) + "\n" for name, each in changed.items()}


def new_tokens(base: Path, tuned: Path) -> dict[str, list[int]]:
    """The tokens that one tokenizer has and another has not.

    Args:
        base: The folder of the one that has not.
        tuned: The folder of the one that has.

    Returns:
        The ids of each token's vectors; `<zorp>` and `<zorp>_1` are two vectors of one token.

    Raises:
        MissingError, CorruptError: See `with_tokens`.
    """
    known = _known_ids(base, _documents(base))
    new = {name: index for name, index in _known_ids(tuned, _documents(tuned)).items() if name not in known}
    tokens = {}
    for name in sorted(new):
        vectors = next(count for count in range(1, len(new) + 1) if f"{name}_{count}" not in new)
        tokens[name] = token_names(name, vectors)
    later = {name for names in tokens.values() for name in names[1:]}
    return {token: [new[name] for name in names] for token, names in tokens.items() if token not in later}


def _added(name: str, index: int) -> dict[str, Any]:
    """What transformers' `add_tokens` writes; normalised, so that case does not matter."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": index, "content": name, **flags}


def _documents(tokenizer: Path) -> dict[str, Any]:
    """The files that tell a tokenizer's vocabulary.

    Raises:
        MissingError: There is none.
    """
    documents = {
        name: _read(tokenizer / name) for name in (TOKENIZER, VOCABULARY, ADDED) if (tokenizer / name).exists()
    }
    if TOKENIZER not in documents and VOCABULARY not in documents:
        fix = f"give a base with {TOKENIZER} or {VOCABULARY}"
        raise MissingError(str(tokenizer), "holds no vocabulary", fix)
    return documents


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptError(str(path), f"is no JSON: {error!r:.100}", "get the base again") from None


def _known_ids(tokenizer: Path, documents: dict[str, Any]) -> dict[str, int]:
    try:
        known: dict[str, int] = {**documents.get(VOCABULARY, {}), **documents.get(ADDED, {})}
        if TOKENIZER in documents:
            known |= documents[TOKENIZER]["model"]["vocab"]
            known |= {entry["content"]: entry["id"] for entry in documents[TOKENIZER]["added_tokens"]}
    except (KeyError, TypeError):
        raise CorruptError(str(tokenizer), "is no CLIP tokenizer", "get the base again") from None
    return known
