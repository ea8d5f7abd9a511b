"""The tokens of several adapters side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.vocabulary import token_names
from lora_pipeline.errors import ParamsError

# For the first and for the second text encoder.
Rows = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens and their rows.

    Args:
        embeddings, embeddings_2: See `Adapter`.
        renamed: For each adapter, the new names of its tokens by their old ones; only of those that have one.
    """

    embeddings: Mapping[str, Tensor]
    embeddings_2: Mapping[str, Tensor]
    renamed: Sequence[Mapping[str, str]]


def joined(adapters: Sequence[tuple[str, Adapter]], rename: bool) -> Tokens:
    """All tokens of all adapters, in the adapters' order.

    Two tokens collide where a tokenizer would need one word for both: CLIP's lower case, and a token of several vectors
    is several words, see `vocabulary.token_names`.

    Args:
        adapters: With their names.
        rename: Whether a token that collides becomes `<zorp-2>`, `<zorp-3>`, ..., the first that collides with none of
            any adapter; otherwise it is refused.

    Raises:
        ParamsError: Two adapters use one token for different rows, and none is to be renamed.
    """
    taken: dict[str, tuple[str, Rows]] = {}
    theirs = {word for _, adapter in adapters for token, rows in _tokens(adapter) for word in _words(token, rows)}
    renamed: list[dict[str, str]] = []
    for name, adapter in adapters:
        renamed.append({})
        for token, rows in _tokens(adapter):
            new = next((each for each in _candidates(token, rename) if _fits(each, token, rows, taken, theirs)), None)
            if new is None:
                fix = "give one of them another name: rename_tokens: true, or --rename-tokens by hand"
                raise ParamsError(name, f"has the token {token}, which is a token of another adapter already", fix)
            taken |= dict.fromkeys(_words(new, rows), (new, rows))
            if new != token:
                renamed[-1][token] = new
    meanings = dict(taken.values())
    first = {token: rows for token, (rows, _) in meanings.items() if rows is not None}
    return Tokens(first, {token: rows for token, (_, rows) in meanings.items() if rows is not None}, renamed)


def _tokens(adapter: Adapter) -> list[tuple[str, Rows]]:
    names = sorted({*adapter.embeddings, *adapter.embeddings_2})
    return [(name, (adapter.embeddings.get(name), adapter.embeddings_2.get(name))) for name in names]


def _words(token: str, rows: Rows) -> list[str]:
    vectors = max(len(each) for each in rows if each is not None)
    return [word.lower() for word in token_names(token, vectors)]


def _candidates(token: str, rename: bool) -> Iterator[str]:
    """The token, and where it may be renamed its numbered names without end."""
    yield token
    stem, end = (token[:-1], ">") if token.endswith(">") else (token, "")
    yield from (f"{stem}-{number}{end}" for number in (count(2) if rename else ()))


def _fits(name: str, token: str, rows: Rows, taken: Mapping[str, tuple[str, Rows]], theirs: Collection[str]) -> bool:
    """Whether the name is free, or stands for the same rows already."""
    meant, known = taken.get(name.lower(), ("", (None, None)))
    if meant == name and all(map(_same, known, rows)):
        return True
    forbidden = taken if name == token else {*taken, *theirs}
    return not any(word in forbidden for word in _words(name, rows))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one.double(), other.double())
