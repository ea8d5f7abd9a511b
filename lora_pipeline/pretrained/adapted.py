"""Adapters in a base: their tokens in its vocabularies, their factors in its models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2, root
from lora_pipeline.errors import CorruptError
from lora_pipeline.injection import inject
from lora_pipeline.injection.tokens import add_placeholder, remove
from lora_pipeline.pretrained.components import Components

Rows = Mapping[str, Tensor]


def add_adapter(components: Components, adapter: Adapter, name: str) -> None:
    """Adds an adapter's tokens and branches to a base.

    Raises:
        CorruptError: The adapter does not fit the base.
        ParamsError: Its name or one of its tokens is taken.
    """
    add_tokens(components, adapter.embeddings, adapter.embeddings_2)
    add_branches(components, adapter, name)


def add_tokens(components: Components, of_first: Rows, of_second: Rows) -> None:
    """Adds tokens, with their rows in each text encoder.

    Raises:
        CorruptError: Rows for fewer or more text encoders than the base has, or of another width.
        ParamsError: A token is taken.
    """
    rows = {TEXT_ENCODER: of_first, TEXT_ENCODER_2: of_second}
    for token in sorted(of_first.keys() | of_second.keys()):
        known = {prefix for prefix, each in rows.items() if token in each}
        if known != set(components.readers):
            problem = f"has rows for {' and '.join(sorted(known))}, the base has {' and '.join(components.readers)}"
            raise CorruptError(token, problem, "give a base of the family it was trained on")
    for prefix, (tokenizer, encoder) in components.readers.items():
        for token, each in rows[prefix].items():
            add_placeholder(tokenizer, encoder, token, each)


def add_branches(components: Components, adapter: Adapter, name: str) -> None:
    """Adds an adapter's factors.

    Raises:
        CorruptError: A layer the base does not have, or factors of another shape.
        ParamsError: The name is taken.
    """
    for prefix, model in components.models.items():
        inject.inject_adapter(model, prefix, adapter, name)
    starts = tuple(root(prefix) for prefix in components.models)
    for target in adapter.factors:
        if not target.startswith(starts):
            raise CorruptError(target, "is no layer of this base", "use the base this adapter was trained on")


def strip(components: Components) -> None:
    """Takes all branches and rows out of the models again; tokenizers keep their tokens."""
    for model in components.models.values():
        inject.remove(model)
    for _, encoder in components.readers.values():
        remove(encoder)


def set_weights(components: Components, weights: inject.Weights) -> None:
    """See `inject.set_weights`, in all models."""
    for model in components.models.values():
        inject.set_weights(model, weights)
