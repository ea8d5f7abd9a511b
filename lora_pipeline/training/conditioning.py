"""Captions to what the UNet reads: asked anew, asked once, or kept while there is room, whichever is right."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from lora_pipeline.data.captions import orders_of
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.denoising import Conditioning, joined
from lora_pipeline.pretrained.encoding import encode_prompts, tokenize
from lora_pipeline.training.cache import TensorCache, fingerprint, key_of
from lora_pipeline.training.phases import Phase

Condition = Callable[[Sequence[str]], Conditioning]
_CAPTIONS_AT_ONCE = 32
_KEPT = 1024


def condition_of(
    mine: Components, phase: Phase, captions: Sequence[str], cache: TensorCache, say: Callable[[str], None]
) -> Condition:
    """How a phase asks the text encoder.

    Args:
        mine: The base, as it is when the phase starts.
        phase: Whether the text encoder learns, and whether captions are shuffled.
        captions: All that may be asked for but for their order.
        cache: What was encoded before.
        say: Told why outputs cannot be known beforehand.
    """
    if phase.text_learns:
        return live(mine)
    if phase.kept_tags is not None and any(orders_of(caption, phase.kept_tags) > 1 for caption in captions):
        say(
            f"{phase.name}: captions are shuffled, so the text encoder is not asked beforehand; "
            f"its last {_KEPT} outputs are kept in memory, none on disk"
        )
        return kept(mine, _KEPT)
    return cached(mine, ["", *captions], cache)


def live(mine: Components) -> Condition:
    """A text encoder that learns is asked anew in every step, once for each caption of the batch."""

    def condition(captions: Sequence[str]) -> Conditioning:
        distinct = sorted(set(captions))
        return encode_prompts(mine, distinct)[[distinct.index(caption) for caption in captions]]

    return condition


@torch.no_grad()
def cached(mine: Components, captions: Sequence[str], cache: TensorCache) -> Condition:
    """A text encoder that does not learn is asked once for each caption, over all runs that share the cache."""
    distinct = sorted(set(captions))
    readers = mine.readers.values()
    marks = [] if cache.folder is None else [fingerprint(encoder) for _, encoder in readers]

    def encoded(some: Sequence[str]) -> Conditioning:
        tensors, _ = cache.get(
            lambda: key_of("captions", *marks, *(tokenize(tokenizer, some) for tokenizer, _ in readers)),
            lambda: encode_prompts(mine, some).tensors(),
        )
        return Conditioning(**tensors)

    starts = range(0, len(distinct), _CAPTIONS_AT_ONCE)
    known = joined([encoded(distinct[start : start + _CAPTIONS_AT_ONCE]) for start in starts]).to(
        mine.text_encoder.device
    )
    places = {caption: place for place, caption in enumerate(distinct)}
    return lambda some: known[[places[caption] for caption in some]]


def kept(mine: Components, most: int) -> Condition:
    """The outputs of the last captions are kept; each is asked for alone, as a resumed run has kept others.

    Args:
        mine: The base; its text encoder must not learn.
        most: How many outputs, those of one batch aside.
    """
    known: OrderedDict[str, Conditioning] = OrderedDict()

    @torch.no_grad()
    def condition(captions: Sequence[str]) -> Conditioning:
        said = []
        for caption in captions:
            if caption not in known:
                known[caption] = encode_prompts(mine, [caption])
            known.move_to_end(caption)
            said.append(known[caption])
        while len(known) > most:
            known.popitem(last=False)
        return joined(said)

    return condition
