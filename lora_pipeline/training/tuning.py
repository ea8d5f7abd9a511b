"""Personalising a base: a concept's pictures in, factors and token rows out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import TEXT_ENCODER, UNET
from lora_pipeline.data.dataset import Example
from lora_pipeline.injection import inject, tokens
from lora_pipeline.pretrained.encoding import encode_prompts, tokenize
from lora_pipeline.pretrained.engine import checkpointed, compiled
from lora_pipeline.training.batches import EncodedExample, Sampler, encode_examples
from lora_pipeline.training.checks import check_task, located
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.loop import LossAt, Report, StepLoss, Stretch, train
from lora_pipeline.training.objective import denoising_loss, schedule_of
from lora_pipeline.training.optimisation import guard_norms
from lora_pipeline.training.phases import INVERSION, TUNING, Phase, phases_of
from lora_pipeline.training.placement import moved, placed
from lora_pipeline.training.processes import together
from lora_pipeline.training.rates import rate_factor, rates_of
from lora_pipeline.training.room import check_room

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams
    from lora_pipeline.pretrained.components import Components

BRANCH = "tuned"
_ROWS = "rows"
Condition = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Args:
        name: The concept's, for errors.
        token: Its placeholder token, or None.
        examples: Its pictures.
        priors: Pictures of its class; may be empty where prior_weight is 0.
        params: How to train.
        seed: All draws depend on it.
    """

    name: str
    token: str | None
    examples: Sequence[Example]
    priors: Sequence[Example]
    params: TrainParams
    seed: int


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was learnt.

    Args:
        factors: By target name; empty with method `ti`.
        embeddings: The placeholder's rows (vectors, dim) by token; empty with method `lora`.
        losses: Of every step.
    """

    factors: Mapping[str, LoraFactors]
    embeddings: Mapping[str, Tensor]
    losses: Sequence[StepLoss]


def tune(
    components: Components, task: Task, work: Path, report: Report, say: Callable[[str], None] = lambda _: None
) -> Tuned:
    """Trains; a call that was killed goes on where its last checkpoint is and ends in the same bytes.

    Args:
        components: The base. It comes back as it was, apart from its UNet's memory layout.
        task: What is to be learnt.
        work: Where checkpoints are kept, for this base and task alone; they stay there.
        report: Told the number of steps done and `loss` and `gradient_norm`, after each.
        say: Told what a user should know before the first step.

    Raises:
        ParamsError: A value that cannot be for this base and these pictures; or the loss stopped being finite, or
            diverges.
        CorruptError: A damaged picture, a caption without the placeholder, a damaged checkpoint.
        MissingError: The optimiser's package is not installed.
        ResourceError: No space left for a checkpoint.
    """
    engine = task.params.engine
    with (
        located(task.name),
        together() as crew,
        private(components) as mine,
        placed(mine, engine.precision),
        checkpointed(mine.unet, engine.gradient_checkpointing),
    ):
        phases = phases_of(task.params)
        check_task(task, phases, mine.tokenizer)
        learning = [phase.name for phase in phases]
        embedding = _add_token(mine, task) if INVERSION in learning else None
        if TUNING in learning:
            _add_branches(mine, task)
        tokenize(mine, [example.caption for example in (*task.examples, *task.priors)])  # refuses those too long
        pools = encode_examples(mine.vae, task.examples), encode_examples(mine.vae, task.priors)
        stretches = [_stretch(mine, task, phase, pools, embedding) for phase in phases]
        check_room(mine, task.params, stretches, pools[0][0].mean.shape, work if crew.first else None, say)
        with compiled(mine.unet, engine.compile):
            losses = train(stretches, work, task.params, report, crew, say)
        factors = inject.collect(mine.unet, UNET, BRANCH) | inject.collect(mine.text_encoder, TEXT_ENCODER, BRANCH)
        rows = {} if embedding is None else {embedding.token: embedding.rows.detach().clone().cpu()}
        return Tuned({target: moved(each, torch.device("cpu")) for target, each in factors.items()}, rows, losses)


@contextmanager
def private(components: Components) -> Iterator[Components]:
    """Inside, a base with a tokenizer of its own; afterwards nothing is left in the models."""
    mine = replace(components, tokenizer=copy.deepcopy(components.tokenizer))
    mine.unet.to(memory_format=torch.channels_last)
    try:
        yield mine
    finally:
        inject.remove(mine.unet)
        inject.remove(mine.text_encoder)
        tokens.remove(mine.text_encoder)


def _add_token(mine: Components, task: Task) -> tokens.PlaceholderEmbedding:
    assert task.token is not None
    rows = tokens.initial_rows(
        mine.tokenizer, mine.text_encoder, task.params.token.initializer, task.params.token.vectors
    )
    return tokens.add_placeholder(mine.tokenizer, mine.text_encoder, task.token, rows)


def _add_branches(mine: Components, task: Task) -> None:
    params = task.params.adapter
    chosen = ((mine.unet, UNET, params.unet_targets), (mine.text_encoder, TEXT_ENCODER, params.text_encoder_targets))
    for model, prefix, globs in chosen:
        inject.inject_new(
            model,
            prefix,
            inject.select_targets(model, prefix, globs),
            BRANCH,
            rank=params.rank,
            alpha=params.alpha,
            generator=generator_for(task.seed, TUNING, 0, f"{prefix} factors"),
        )


def _stretch(
    mine: Components,
    task: Task,
    phase: Phase,
    pools: tuple[Sequence[EncodedExample], Sequence[EncodedExample]],
    embedding: tokens.PlaceholderEmbedding | None,
) -> Stretch:
    inverting = phase.name == INVERSION
    parameters: dict[str, nn.Parameter] = {}
    rates: dict[str, float] = {}
    if not inverting:
        everything = inject.trainable(mine.unet) | inject.trainable(mine.text_encoder)
        rates = rates_of(everything, task.params.tuning)
        parameters = {name: parameter for name, parameter in everything.items() if rates[name] > 0}
        for name in everything.keys() - parameters.keys():
            everything[name].requires_grad_(False)
    elif embedding is not None:
        parameters = {_ROWS: embedding.rows}
        largest = float(embedding.weight.norm(dim=1).max())

    def enter() -> LossAt:
        for model in (mine.unet, mine.text_encoder):
            inject.set_weights(model, {BRANCH: 0.0 if inverting else 1.0})
        captions = ["", *(example.caption for pool in pools for example in pool)]
        condition = live(mine) if phase.text_learns else cached(mine, captions)
        schedule = schedule_of(mine.scheduler)
        return loss_of(mine, Sampler(phase, pools, task.params.batch_size, schedule.timesteps, task.seed), condition)

    def after_step() -> None:
        if inverting and embedding is not None:
            guard_norms(embedding.rows, largest)

    factor = rate_factor(task.params.optimiser, phase.steps)
    return Stretch(phase, parameters, enter, after_step, factor, rates, frozenset({_ROWS}))


def live(mine: Components) -> Condition:
    """A text encoder that learns is asked anew in every step, once for each caption of the batch."""

    def condition(captions: Sequence[str]) -> Tensor:
        distinct = sorted(set(captions))
        return encode_prompts(mine, distinct)[[distinct.index(caption) for caption in captions]]

    return condition


@torch.no_grad()
def cached(mine: Components, captions: Sequence[str]) -> Condition:
    """A text encoder that does not learn is asked once for each caption."""
    distinct = sorted(set(captions))
    known = torch.cat([encode_prompts(mine, distinct[start : start + 32]) for start in range(0, len(distinct), 32)])
    places = {caption: place for place, caption in enumerate(distinct)}
    return lambda some: known[[places[caption] for caption in some]]


def loss_of(mine: Components, sampler: Sampler, condition: Condition) -> LossAt:
    """The loss of a step: instances and priors go through the UNet together."""
    schedule = schedule_of(mine.scheduler)

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        noisy = noisy.to(conditioning.dtype).contiguous(memory_format=torch.channels_last)
        return cast(Tensor, mine.unet(noisy, timesteps, conditioning, return_dict=False)[0])

    def loss_at(step: int) -> Tensor:
        batch = moved(sampler.batch(step), mine.unet.device)
        return denoising_loss(
            predict, schedule, batch.latents, condition(batch.captions), batch.noise, batch.timesteps, batch.weights
        ).sum()

    return loss_at
