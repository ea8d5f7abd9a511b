"""What learns, put into a base and taken out of it again: the placeholder's rows, and the branches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import TEXT_ENCODER, UNET
from lora_pipeline.injection import inject, tokens
from lora_pipeline.injection.chance import Chance
from lora_pipeline.injection.kinds import maker
from lora_pipeline.injection.patterns import by_target, check_patterns
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.losses import BRANCH
from lora_pipeline.training.phases import INVERSION, TUNING
from lora_pipeline.training.placement import moved

if TYPE_CHECKING:
    from lora_pipeline.params.training import AdapterParams
    from lora_pipeline.pretrained.components import Components
    from lora_pipeline.training.tuning import Task

T = TypeVar("T")


def add_token(mine: Components, task: Task) -> dict[str, tokens.PlaceholderEmbedding]:
    """Adds the placeholder to all text encoders; gives its rows by encoder.

    Raises:
        ParamsError: It is a token already, or the words to start from hold none.
    """
    assert task.token is not None
    added = {}
    for prefix, (tokenizer, encoder) in mine.readers.items():
        purpose = f"token rows{prefix.removeprefix(TEXT_ENCODER)}"
        rows = tokens.initial_rows(
            tokenizer,
            encoder,
            task.params.token.initializer,
            task.params.token.vectors,
            generator_for(task.seed, INVERSION, 0, purpose),
        )
        added[prefix] = tokens.add_placeholder(tokenizer, encoder, task.token, rows)
    return added


def add_branches(mine: Components, task: Task, chance: Chance | None) -> None:
    """Adds branches to the layers that params.yaml names.

    Raises:
        ParamsError: A glob that matches nothing, a rank that does not fit, or what a kind does not have.
    """
    params = task.params.adapter
    targets = {
        prefix: inject.select_targets(
            model, prefix, params.unet_targets if prefix == UNET else params.text_encoder_targets
        )
        for prefix, model in mine.models.items()
    }
    check_patterns("adapter.ranks", params.ranks, targets)
    check_patterns("adapter.alphas", params.alphas, targets)
    for prefix, model in mine.models.items():
        ranks = by_target(prefix, targets[prefix], params.rank, params.ranks)
        alphas = by_target(prefix, targets[prefix], params.alpha, params.alphas)
        if params.rank_stabilised:  # alpha / sqrt(rank) as alpha · sqrt(rank) / rank, which every reader knows
            alphas = {target: alpha * math.sqrt(ranks[target]) for target, alpha in alphas.items()}
        inject.inject_new(
            model,
            prefix,
            targets[prefix],
            BRANCH,
            rank=ranks,
            alpha=alphas,
            generator=generator_for(task.seed, TUNING, 0, f"{prefix} factors"),
            make=maker(params.kind, params.init, params.factor),
            chance=chance,
        )


def chance_of(params: AdapterParams, seed: int) -> Chance | None:
    """What branches leave out while they learn."""
    if not (params.dropout or params.rank_dropout or params.module_dropout):
        return None
    return Chance(
        params.dropout,
        params.rank_dropout,
        params.module_dropout,
        lambda batch, purpose: generator_for(seed, TUNING, batch, f"dropout {purpose}"),
    )


def factors_of(mine: Components) -> dict[str, LoraFactors]:
    """Copies of what all branches learnt, by target, on the CPU."""
    found = _of_all(mine, inject.collect)
    return {target: moved(each, torch.device("cpu")) for target, each in found.items()}


def magnitudes_of(mine: Components) -> dict[str, Tensor]:
    """Copies of what DoRAs learnt beside their factors, by target."""
    return _of_all(mine, inject.collect_magnitudes)


def _of_all(mine: Components, collect: Callable[[Any, str, str], dict[str, T]]) -> dict[str, T]:
    """What is collected of all models, by target."""
    parts = [collect(model, prefix, BRANCH) for prefix, model in mine.models.items()]
    return {target: each for part in parts for target, each in part.items()}


def rows_of(embedding: tokens.PlaceholderEmbedding | None) -> dict[str, Tensor]:
    """A copy of the placeholder's rows by its name, on the CPU."""
    return {} if embedding is None else {embedding.token: embedding.rows.detach().clone().cpu()}
