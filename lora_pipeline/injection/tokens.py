"""Placeholder tokens: new rows beside a frozen embedding (textual inversion, Gal et al. 2022, arXiv:2208.01618).

A token of several vectors is several tokens of the tokenizer, `<zorp>`, `<zorp>_1`, `<zorp>_2`, the names diffusers
gives them too; `expand` writes them out in a prompt before it is tokenised.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_pipeline.adapters.vocabulary import token_names
from lora_pipeline.errors import CorruptError, ParamsError

RANDOM, ZERO = "<random>", "<zero>"
WORDLESS = (RANDOM, ZERO)  # where a placeholder may start, beside words


class PlaceholderEmbedding(nn.Module):
    """An embedding with extra rows for the ids from `first_id` on.

    The rows are a parameter of their own, so training them cannot move any other row, whatever the optimiser. Several
    placeholders wrap each other.

    Args:
        base: The embedding, or another PlaceholderEmbedding, which stays what it is.
        token: The placeholder.
        first_id: The id of its first vector.
        rows: (vectors, dim); kept in float32.
    """

    def __init__(self, base: nn.Module, token: str, first_id: int, rows: Tensor) -> None:
        super().__init__()
        self.base = base
        self.token = token
        self.first_id = first_id
        self.rows = nn.Parameter(rows.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """The original embedding's weight, for those who ask for its dtype or device."""
        return cast(Tensor, self.base.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids -> (..., dim), in the base's dtype."""
        offset = ids - self.first_id
        own = (offset >= 0) & (offset < self.rows.shape[0])
        base: Tensor = self.base(ids.masked_fill(own, 0))
        rows = nn.functional.embedding(offset.masked_fill(~own, 0), self.rows)
        return torch.where(own.unsqueeze(-1), rows.to(base.dtype), base)


def add_placeholder(
    tokenizer: Any,
    text_encoder: Any,
    token: str,
    rows: Tensor,
) -> PlaceholderEmbedding:
    """Adds a token to a tokenizer and its rows to a text encoder.

    Args:
        tokenizer: A CLIPTokenizer; it keeps the token when the rows are removed again.
        text_encoder: A CLIPTextModel.
        token: For example `<zorp>`. Case does not matter to the tokenizer.
        rows: (vectors, dim).

    Returns:
        The embedding that is now the text encoder's; its `rows` are trainable.

    Raises:
        ParamsError: The token is one already, or the tokenizer would not see it in a prompt.
        CorruptError: The rows are of another width than the text encoder's.
    """
    base = text_encoder.get_input_embeddings()
    width = base.weight.shape[1]
    if rows.ndim != 2 or rows.shape[1] != width:
        problem = f"its rows are {tuple(rows.shape)}, the text encoder's are {width} wide"
        raise CorruptError(token, problem, "use the base this adapter was trained on")
    names = token_names(token, rows.shape[0])
    known = {word.lower() for word in tokenizer.get_vocab()}
    for name in names:
        if not name.strip() or name != name.strip() or {name.lower(), name.lower() + "</w>"} & known:
            problem = f"{name!r} is a token already, or blank"
            raise ParamsError("placeholder_token", problem, "use a new word in angle brackets, such as <zorp>")
    tokenizer.add_tokens(names)
    ids = tokenizer.convert_tokens_to_ids(names)
    embedding = PlaceholderEmbedding(base, token, ids[0], rows.to(base.weight.device))
    text_encoder.set_input_embeddings(embedding)
    return embedding


def remove(text_encoder: Any) -> None:
    """Puts the original embedding back: the same object, untouched."""
    embedding = text_encoder.get_input_embeddings()
    while isinstance(embedding, PlaceholderEmbedding):
        embedding = embedding.base
    text_encoder.set_input_embeddings(embedding)


def expand(tokenizer: Any, prompt: str) -> str:
    """Writes out placeholders of several vectors: `a <zorp>` -> `a <zorp> <zorp>_1`."""
    added = set(tokenizer.get_added_vocab())
    for token in sorted(token for token in added if f"{token}_1" in added):
        vectors = next(count for count in range(2, len(added) + 2) if f"{token}_{count}" not in added)
        written = " ".join(token_names(token, vectors))
        prompt = re.sub(re.escape(token) + r"(?!_\d)", lambda _, written=written: written, prompt, flags=re.IGNORECASE)  # type: ignore[misc]  # mypy cannot type a lambda's default
    return prompt


def initial_rows(
    tokenizer: Any, text_encoder: Any, words: str, vectors: int, generator: torch.Generator | None = None
) -> Tensor:
    """Rows to start a placeholder from.

    Args:
        tokenizer: A CLIPTokenizer.
        text_encoder: A CLIPTextModel.
        words: What the concept resembles, such as its class noun; or `<random>`, normal with the spread of the
            encoder's own rows, or `<zero>`.
        vectors: How many rows.
        generator: For `<random>`.

    Returns:
        (vectors, dim) float32. The words' tokens are dealt out to the vectors and averaged; if there are fewer tokens
        than vectors they are used again.

    Raises:
        ParamsError: The words hold no token.
    """
    weight: Tensor = text_encoder.get_input_embeddings().weight.detach().float()
    if words == ZERO:
        return torch.zeros(vectors, weight.shape[1])
    if words == RANDOM:
        drawn = torch.randn(vectors, weight.shape[1], generator=generator)
        return drawn * weight.std(dim=0).cpu() + weight.mean(dim=0).cpu()
    ids = tokenizer(words, add_special_tokens=False, padding=False)["input_ids"]
    if not ids:
        raise ParamsError(
            "initializer", f"{words!r} holds no token", "use a word the base knows, such as the class noun"
        )
    return torch.stack([weight[ids[index::vectors] or [ids[index % len(ids)]]].mean(dim=0) for index in range(vectors)])
