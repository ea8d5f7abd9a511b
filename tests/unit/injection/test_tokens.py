"""Placeholder tokens on a stand-in tokenizer; the real one is in tests/integration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.injection.tokens import add_placeholder, expand, initial_rows, remove

WORDS = ["a</w>", "creature</w>", "sky</w>", "red</w>", "<end>"]


class Tokenizer:
    """Splits at blanks."""

    def __init__(self) -> None:
        self.vocabulary = {word: index for index, word in enumerate(WORDS)}
        self.added: dict[str, int] = {}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary | self.added

    def get_added_vocab(self) -> dict[str, int]:
        return self.added

    def add_tokens(self, names: list[str]) -> None:
        for name in names:
            self.added[name] = len(self.get_vocab())

    def convert_tokens_to_ids(self, names: list[str]) -> list[int]:
        return [self.get_vocab()[name] for name in names]

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [self.vocabulary[f"{word}</w>"] for word in text.split()]}


class TextEncoder(nn.Module):
    """Only the part placeholders need."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding: Any = nn.Embedding(len(WORDS), 3, dtype=dtype).requires_grad_(False)

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        self.embedding = embedding


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def text_encoder() -> TextEncoder:
    return TextEncoder()


def test_new_ids_give_new_rows_and_old_ids_the_old(tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
    table = text_encoder.embedding.weight.clone()
    first = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    second = torch.tensor([[7.0, 8.0, 9.0]])
    add_placeholder(tokenizer, text_encoder, "<a>", first)
    add_placeholder(tokenizer, text_encoder, "<b>", second)
    ids = torch.tensor([[0, 5, 6, 7], [4, 7, 5, 1]])
    expected = torch.cat([table, first, second])[ids]
    assert torch.equal(text_encoder.embedding(ids), expected)


def test_a_padded_table_gives_way_to_the_placeholder(tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
    text_encoder.embedding = nn.Embedding(8, 3)
    add_placeholder(tokenizer, text_encoder, "<a>", torch.ones(1, 3))
    assert torch.equal(text_encoder.embedding(torch.tensor([5])), torch.ones(1, 3))


def test_no_optimiser_can_move_another_row(tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
    table = text_encoder.embedding.weight.clone()
    base = text_encoder.embedding
    embedding = add_placeholder(tokenizer, text_encoder, "<a>", torch.zeros(2, 3))
    trained = [parameter for parameter in text_encoder.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in trained] == [(2, 3)]
    optimiser = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    target = torch.ones(4, 3)
    for _ in range(3):
        (embedding(torch.tensor([0, 5, 6, 3])) - target).square().sum().backward()
        optimiser.step()
    assert embedding.rows.min() > 0
    remove(text_encoder)
    assert text_encoder.embedding is base
    assert torch.equal(text_encoder.embedding.weight, table)


def test_rows_are_float32_and_outputs_the_bases_dtype(tokenizer: Tokenizer) -> None:
    text_encoder = TextEncoder(torch.float16)
    embedding = add_placeholder(tokenizer, text_encoder, "<a>", torch.ones(1, 3, dtype=torch.float16))
    assert embedding.rows.dtype == torch.float32
    assert embedding(torch.tensor([5, 0])).dtype == torch.float16
    assert embedding.weight.dtype == torch.float16


@pytest.mark.parametrize("token", ["creature", "Creature", "<end>", "<A>", "<a>_1", " <z>", ""])
def test_a_token_that_is_one_already_is_refused(tokenizer: Tokenizer, text_encoder: TextEncoder, token: str) -> None:
    add_placeholder(tokenizer, text_encoder, "<a>", torch.ones(2, 3))
    before = dict(tokenizer.added)
    with pytest.raises(ParamsError, match="placeholder_token"):
        add_placeholder(tokenizer, text_encoder, token, torch.ones(1, 3))
    assert tokenizer.added == before


@pytest.mark.parametrize("shape", [(3,), (1, 4)])
def test_rows_of_another_width_are_refused(
    tokenizer: Tokenizer, text_encoder: TextEncoder, shape: tuple[int, ...]
) -> None:
    with pytest.raises(CorruptError, match="<a>"):
        add_placeholder(tokenizer, text_encoder, "<a>", torch.ones(shape))
    assert not tokenizer.added


def test_prompts_are_written_out(tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
    add_placeholder(tokenizer, text_encoder, "<a>", torch.ones(3, 3))
    add_placeholder(tokenizer, text_encoder, "<b>", torch.ones(1, 3))
    prompt = "a <A> creature, <b> and <a>."
    written = "a <a> <a>_1 <a>_2 creature, <b> and <a> <a>_1 <a>_2."
    assert expand(tokenizer, prompt) == written
    assert expand(tokenizer, "a creature") == "a creature"


@pytest.mark.parametrize(
    ("words", "vectors", "dealt"),
    [
        ("creature", 1, [[1]]),
        ("creature", 2, [[1], [1]]),
        ("red creature", 1, [[3, 1]]),
        ("red creature sky", 2, [[3, 2], [1]]),
        ("red creature", 3, [[3], [1], [3]]),
    ],
)
def test_initial_rows_come_from_the_words(
    tokenizer: Tokenizer, text_encoder: TextEncoder, words: str, vectors: int, dealt: list[list[int]]
) -> None:
    table = text_encoder.embedding.weight
    expected = torch.stack([table[ids].mean(dim=0) for ids in dealt])
    assert torch.equal(initial_rows(tokenizer, text_encoder, words, vectors), expected)


def test_no_words_are_refused(tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
    with pytest.raises(ParamsError, match="initializer"):
        initial_rows(tokenizer, text_encoder, "", 1)
