"""Adapters attached to a base: their tokens, their branches, and what drives their weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.errors import ParamsError
from lora_pipeline.params import suggestion
from lora_pipeline.pretrained.adapted import add_adapter
from lora_pipeline.pretrained.components import Components
from lora_pipeline.rendering.schedule import WeightSchedule
from lora_pipeline.rendering.weighting import Weighting, weighted

_PLACEHOLDER = re.compile(r"<[^<>\s]+>")
_SPECIAL = "<|"


@dataclass(frozen=True)
class Attachment:
    """An adapter, the name it goes by, and how strongly it acts when and where."""

    name: str
    adapter: Adapter
    schedule: WeightSchedule


def attach(components: Components, attachments: Sequence[Attachment]) -> None:
    """Adds adapters' tokens and branches to a base.

    Args:
        components: The base; it is changed.
        attachments: The adapters, made for this base (see `adapters.adapter.check_base`).

    Raises:
        CorruptError: An adapter does not fit the base.
        ParamsError: Two adapters have the same name, or the same token.
    """
    names = [each.name for each in attachments]
    for name in names:
        if names.count(name) > 1:
            raise ParamsError(name, "names two adapters", "give each adapter its own name")
    for each in attachments:
        add_adapter(components, each.adapter, each.name)


@contextmanager
def acting(
    components: Components, attachments: Sequence[Attachment], steps: int, *, combine: str, every: int, executor: str
) -> Iterator[Weighting | None]:
    """Inside, attached adapters act as their schedules say; None where there are none. See `weighted`."""
    if not attachments:
        yield None
        return
    adapters = {each.name: each.adapter for each in attachments}
    schedules = {each.name: each.schedule for each in attachments}
    with weighted(components, adapters, schedules, steps, combine=combine, every=every, executor=executor) as weighting:
        yield weighting


def check_placeholders(tokenizer: Any, adapters: Sequence[Adapter], prompts: Sequence[str]) -> None:
    """Refuses words in angle brackets that nothing taught: they would be read letter by letter, and mean nothing.

    Nothing is refused beside an adapter that may have been taught any word, as it brings no tokens and does not say
    how it was trained.

    Args:
        tokenizer: With the adapters' tokens.
        adapters: The attached ones.
        prompts: To be drawn.

    Raises:
        ParamsError: Names the prompt, the word, and the placeholders there are.
    """
    if any(not each.embeddings and "params" not in each.provenance for each in adapters):
        return
    known = {token for token in tokenizer.get_added_vocab() if not token.startswith(_SPECIAL)}
    known = known.union(*map(_taught, adapters))
    lowered = {token.lower() for token in known}
    for prompt in prompts:
        for word in _PLACEHOLDER.findall(prompt):
            if word.lower() not in lowered:
                problem = f"{word} is no token; known: {', '.join(sorted(known)) or 'none'}"
                raise ParamsError(f"the prompt {prompt!r}", problem, suggestion(word, known))


def _taught(adapter: Adapter) -> set[str]:
    """The placeholder of an adapter's training: with method `lora` it is spelt in letters and is no token."""
    params = adapter.provenance.get("params")
    token = params.get("placeholder_token") if isinstance(params, Mapping) else None
    return {token} if isinstance(token, str) else set()
