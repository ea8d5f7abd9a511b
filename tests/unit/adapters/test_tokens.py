"""The tokens of several adapters side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.tokens import joined
from lora_pipeline.errors import ParamsError


def rows(value: float, vectors: int = 1) -> Tensor:
    return torch.full((vectors, 4), float(value))


def having(tokens: dict[str, Tensor], second: dict[str, Tensor] | None = None) -> Adapter:
    return Adapter({}, tokens, embeddings_2=second or {})


def test_different_tokens_stand_side_by_side() -> None:
    tokens = joined([("a", having({"<a>": rows(1)})), ("b", having({"<b>": rows(2)}, {"<b>": rows(3)}))], rename=False)
    assert tokens.embeddings.keys() == {"<a>", "<b>"}
    assert tokens.embeddings_2.keys() == {"<b>"}
    assert torch.equal(tokens.embeddings_2["<b>"], rows(3))
    assert tokens.renamed == [{}, {}]


@pytest.mark.parametrize("rename", [False, True])
def test_one_token_with_one_meaning_is_no_collision(rename: bool) -> None:
    half = having({"<a>": rows(1).half()})
    tokens = joined([("a", having({"<a>": rows(1)})), ("b", half)], rename)
    assert tokens.embeddings.keys() == {"<a>"}
    assert tokens.renamed == [{}, {}]


@pytest.mark.parametrize(
    "other",
    [
        having({"<a>": rows(2, 2)}),
        having({"<a>": rows(1)}),
        having({"<A>": rows(1, 2)}),
        having({"<a>_1": rows(1)}),
        having({"<a>": rows(1, 2)}, {"<a>": rows(1, 2)}),
        having({}, {"<a>": rows(1, 2)}),
    ],
    ids=["rows", "vectors", "case", "word", "both encoders", "second encoder"],
)
def test_one_word_with_two_meanings_is_refused(other: Adapter) -> None:
    with pytest.raises(ParamsError, match="b: has the token") as caught:
        joined([("a", having({"<a>": rows(1, 2)})), ("b", other)], rename=False)
    assert "rename" in caught.value.fix


def test_a_token_that_collides_gets_the_first_free_number() -> None:
    parts = [
        ("a", having({"<a>": rows(1)}, {"<a>": rows(10)})),
        ("b", having({"<a>": rows(2)}, {"<a>": rows(20)})),
        ("c", having({"<a>": rows(3)}, {"<a>": rows(30)})),
    ]
    tokens = joined(parts, rename=True)
    assert tokens.renamed == [{}, {"<a>": "<a-2>"}, {"<a>": "<a-3>"}]
    for token, value in (("<a>", 1), ("<a-2>", 2), ("<a-3>", 3)):
        assert torch.equal(tokens.embeddings[token], rows(value))
        assert torch.equal(tokens.embeddings_2[token], rows(10 * value))


def test_a_new_name_is_nobodys_own() -> None:
    parts = [("a", having({"sks": rows(1)})), ("b", having({"sks": rows(2)})), ("c", having({"SKS-2": rows(3)}))]
    tokens = joined(parts, rename=True)
    assert tokens.renamed == [{}, {"sks": "sks-3"}, {}]
    assert torch.equal(tokens.embeddings["SKS-2"], rows(3))


def test_equal_meanings_share_their_new_name() -> None:
    parts = [("a", having({"<a>": rows(1)})), ("b", having({"<a>": rows(2)})), ("c", having({"<a>": rows(2)}))]
    tokens = joined(parts, rename=True)
    assert tokens.renamed == [{}, {"<a>": "<a-2>"}, {"<a>": "<a-2>"}]
    assert tokens.embeddings.keys() == {"<a>", "<a-2>"}


def test_the_words_of_renamed_tokens_never_run_into_each_other() -> None:
    parts = [("a", having({"<a>": rows(1, 2)})), ("b", having({"<A>": rows(2), "<a>_1": rows(3)}))]
    tokens = joined(parts, rename=True)
    assert tokens.renamed == [{}, {"<A>": "<A-2>", "<a>_1": "<a>_1-2"}]
