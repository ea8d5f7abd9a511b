"""Personalising a base: a concept's pictures in, factors and token rows out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from lora_pipeline.pretrained.encoding import tokenize
from lora_pipeline.training.batches import Batch, Sampler
from lora_pipeline.training.cache import TensorCache
from lora_pipeline.training.checks import check_task, located, repeats_of
from lora_pipeline.training.conditioning import Condition, condition_of
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.encodings import EncodedExample, Encoder
from lora_pipeline.training.loop import LossAt, Report, StepLoss, Stretch, train
from lora_pipeline.training.objective import denoising_loss, schedule_of
from lora_pipeline.training.optimisation import guard_norms
from lora_pipeline.training.phases import INVERSION, TUNING, Phase, phases_of
from lora_pipeline.training.validation import Validation, set_aside, validation_batches

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams
    from lora_pipeline.pretrained.components import Components

BRANCH = "tuned"
_ROWS = "rows"
Say = Callable[[str], None]


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
        validation: The loss on pictures that were set aside, of the steps it was looked at.
    """

    factors: Mapping[str, LoraFactors]
    embeddings: Mapping[str, Tensor]
    losses: Sequence[StepLoss]
    validation: Sequence[StepLoss] = ()


@dataclass(frozen=True, eq=False)
class Pools:
    """Pictures as the UNet knows them.

    Args:
        own: What is learnt from.
        of_class: Pictures of its class.
        aside: Pictures that are not learnt from.
    """

    own: Sequence[EncodedExample]
    of_class: Sequence[EncodedExample]
    aside: Sequence[EncodedExample]

    def captions(self) -> list[str]:
        """All that may be asked for."""
        return [example.caption for pool in (self.own, self.of_class, self.aside) for example in pool]


def tune(
    components: Components,
    task: Task,
    work: Path,
    report: Report,
    say: Say = lambda _: None,
    cache: Path | None = None,
) -> Tuned:
    """Trains; a call that was killed goes on where its last checkpoint is and ends in the same bytes.

    Args:
        components: The base. It comes back as it was, apart from its UNet's memory layout.
        task: What is to be learnt.
        work: Where checkpoints are kept, for this base and task alone; they stay there.
        report: Told the number of steps done and `loss` and `gradient_norm`, after each; `validation_loss` sometimes.
        say: Told what a user should know.
        cache: A folder of encodings that runs may share; None encodes everything anew, to the same bytes.

    Raises:
        ParamsError: A value that cannot be for this base and these pictures; or the loss stopped being finite.
        CorruptError: A damaged picture, a caption without the placeholder, a damaged checkpoint.
        ResourceError: No space left for a checkpoint.
    """
    with located(task.name), private(components) as mine:
        phases = phases_of(task.params)
        check_task(task, phases, mine.tokenizer)
        learning = [phase.name for phase in phases]
        embedding = _add_token(mine, task) if INVERSION in learning else None
        if TUNING in learning:
            _add_branches(mine, task)
        tokenize(mine, [example.caption for example in (*task.examples, *task.priors)])  # refuses those too long
        encodings = TensorCache(cache)
        pools = _pools(mine, task, encodings, say)
        validation = Validation(task.params.validation.every, phases, work)

        def condition(phase: Phase) -> Condition:
            return condition_of(mine, phase, pools.captions(), encodings, say)

        stretches = [_stretch(mine, task, phase, pools, embedding, condition, validation) for phase in phases]
        losses = train(stretches, work, task.params.checkpoint_every, validation.watching(report))
        encodings.shrink()
        factors = inject.collect(mine.unet, UNET, BRANCH) | inject.collect(mine.text_encoder, TEXT_ENCODER, BRANCH)
        rows = {} if embedding is None else {embedding.token: embedding.rows.detach().clone()}
        return Tuned(factors, rows, losses, validation.losses())


def _pools(mine: Components, task: Task, encodings: TensorCache, say: Say) -> Pools:
    pictures, looks = task.params.pictures, task.params.validation
    repeated = list(zip(task.examples, repeats_of(task.examples, pictures.repeats), strict=True))
    own, aside = set_aside(repeated, looks.pictures if looks.every else 0, task.seed)
    encoder = Encoder(mine.vae, encodings, say)
    learnt = encoder.examples([example for example, _ in own], pictures.flip)
    return Pools(
        [replace(each, repeats=times) for each, (_, times) in zip(learnt, own, strict=True)],
        encoder.examples(task.priors),
        encoder.examples([example for example, _ in aside]),
    )


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
    pools: Pools,
    embedding: tokens.PlaceholderEmbedding | None,
    condition_in: Callable[[Phase], Condition],
    validation: Validation,
) -> Stretch:
    inverting = phase.name == INVERSION
    parameters: dict[str, nn.Parameter] = {}
    if not inverting:
        parameters = inject.trainable(mine.unet) | inject.trainable(mine.text_encoder)
    elif embedding is not None:
        parameters = {_ROWS: embedding.rows}
        largest = float(embedding.weight.norm(dim=1).max())

    def enter() -> LossAt:
        for model in (mine.unet, mine.text_encoder):
            inject.set_weights(model, {BRANCH: 0.0 if inverting else 1.0})
        loss_in = batch_loss(mine, condition_in(phase))
        timesteps = schedule_of(mine.scheduler).timesteps
        validation.look = lambda: seen(loss_in, validation_batches(pools.aside, timesteps))
        return loss_of(
            loss_in, Sampler(phase, (pools.own, pools.of_class), task.params.batch_size, timesteps, task.seed)
        )

    def after_step() -> None:
        if inverting and embedding is not None:
            guard_norms(embedding.rows, largest)

    return Stretch(phase, parameters, enter, after_step)


def batch_loss(mine: Components, condition: Condition) -> Callable[[Batch], Tensor]:
    """The loss of a batch: instances and priors go through the UNet together."""
    schedule = schedule_of(mine.scheduler)

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return cast(Tensor, mine.unet(noisy, timesteps, conditioning, return_dict=False)[0])

    def loss_in(batch: Batch) -> Tensor:
        return denoising_loss(
            predict, schedule, batch.latents, condition(batch.captions), batch.noise, batch.timesteps, batch.weights
        ).sum()

    return loss_in


def loss_of(loss_in: Callable[[Batch], Tensor], sampler: Sampler) -> LossAt:
    """The loss of a step."""

    def loss_at(step: int) -> Tensor:
        first, *others = [loss_in(batch) for batch in sampler.batches(step)]
        return sum(others, first)

    return loss_at


@torch.no_grad()
def seen(loss_in: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> float:
    """The losses' sum."""
    return sum(float(loss_in(batch)) for batch in batches)
