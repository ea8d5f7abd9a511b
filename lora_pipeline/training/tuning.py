"""Personalising a base: a concept's pictures in, factors and token rows out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from lora_pipeline.training.batches import EncodedExample, Sampler, anchors_of, encode_examples
from lora_pipeline.training.checks import check_task, located
from lora_pipeline.training.draws import generator_for
from lora_pipeline.training.loop import LossAt, Report, StepLoss, Stretch, train
from lora_pipeline.training.noising import noised, target_of
from lora_pipeline.training.objective import Objective, distances, objective_of
from lora_pipeline.training.optimisation import guard_norms
from lora_pipeline.training.phases import FACTORS, INVERSION, TOKEN, TUNING, WEIGHTS, Phase, phases_of, turns
from lora_pipeline.training.placement import moved, placed
from lora_pipeline.training.processes import together
from lora_pipeline.training.rates import rate_factor, rates_of
from lora_pipeline.training.room import check_room
from lora_pipeline.training.whole import learnt_weights, own_copies, whole_models

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams
    from lora_pipeline.pretrained.components import Components

BRANCH = "tuned"
_ROWS = "rows"
Condition = Callable[[Sequence[str]], Tensor]
Anchor = Callable[[Tensor, Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Args:
        name: The concept's, for errors.
        token: Its placeholder token, or None.
        examples: Its pictures.
        priors: Pictures of its class; may be empty where prior.weight is 0, or prior.target is prediction.
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
        factors: By target name; empty with methods `ti` and `full`.
        embeddings: The placeholder's rows (vectors, dim) by token; empty where the token does not learn.
        losses: Of every step.
        weights: The base's own as they are now, by canonical name (see `adapters.weights`); of method `full` alone.
    """

    factors: Mapping[str, LoraFactors]
    embeddings: Mapping[str, Tensor]
    losses: Sequence[StepLoss]
    weights: Mapping[str, Tensor] = field(default_factory=dict)


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
        placed(components, engine.precision),
        private(_copied(components, task.params)) as mine,
        checkpointed(mine.unet, engine.gradient_checkpointing),
    ):
        phases = phases_of(task.params)
        check_task(task, phases, mine.tokenizer)
        learning = frozenset().union(*(phase.learns for phase in phases))
        embedding = _add_token(mine, task) if TOKEN in learning else None
        if FACTORS in learning:
            _add_branches(mine, task)
        tokenize(mine, [example.caption for example in (*task.examples, *task.priors)])  # refuses those too long
        pools = _pools(mine, task)
        stretches = [_stretch(mine, components, task, phase, pools, embedding) for phase in phases]
        check_room(mine, task.params, stretches, pools[0][0].mean.shape, work if crew.first else None, say)
        with compiled(mine.unet, engine.compile):
            losses = train(stretches, work, task.params, report, crew, say)
        factors = inject.collect(mine.unet, UNET, BRANCH) | inject.collect(mine.text_encoder, TEXT_ENCODER, BRANCH)
        rows = {} if embedding is None else {embedding.token: embedding.rows.detach().clone().cpu()}
        weights = learnt_weights(mine, _text_learns(task.params)) if WEIGHTS in learning else {}
        factors = {target: moved(each, torch.device("cpu")) for target, each in factors.items()}
        return Tuned(factors, rows, losses, weights)


def _text_learns(params: TrainParams) -> bool:
    return bool(params.adapter.text_encoder_targets)


def _copied(components: Components, params: TrainParams) -> Components:
    if params.method != "full":
        return components
    return own_copies(components, params.engine.precision, _text_learns(params))


def _pools(mine: Components, task: Task) -> tuple[list[EncodedExample], list[EncodedExample]]:
    """Instances and priors; where there are no class pictures the base is asked about the concept's own."""
    own = encode_examples(mine.vae, task.examples, task.params.objective.mask_background)
    of_class = encode_examples(mine.vae, task.priors)
    if not of_class and task.token is not None and task.params.prior.target == "prediction":
        return own, anchors_of(own, task.token)
    return own, of_class


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
        mine.tokenizer,
        mine.text_encoder,
        task.params.token.initializer,
        task.params.token.vectors,
        generator_for(task.seed, INVERSION, 0, "token rows"),
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
    base: Components,
    task: Task,
    phase: Phase,
    pools: tuple[Sequence[EncodedExample], Sequence[EncodedExample]],
    embedding: tokens.PlaceholderEmbedding | None,
) -> Stretch:
    objective = objective_of(task.params, phase, mine.scheduler)
    everything = _learners(mine, task, phase, embedding)
    rates = dict.fromkeys(everything, 1.0) if phase.name == INVERSION else rates_of(everything, task.params.tuning)
    parameters = {name: parameter for name, parameter in everything.items() if rates[name] > 0}
    for name in everything.keys() - parameters.keys():
        everything[name].requires_grad_(False)
    largest = 0.0 if embedding is None else float(embedding.weight.norm(dim=1).max())

    def enter() -> LossAt:
        for model in (mine.unet, mine.text_encoder):
            inject.set_weights(model, {BRANCH: float(FACTORS in phase.learns)})
        captions = ["", *(example.caption for pool in pools for example in pool)]
        condition = live(mine) if phase.text_learns else cached(mine, captions)
        sampler = Sampler(phase, pools, task.params.batch_size, objective, task.seed)
        anchored = phase.prior_weight > 0 and task.params.prior.target == "prediction"
        other = mine if base.unet is mine.unet else replace(base, tokenizer=mine.tokenizer)
        anchor = base_prediction(other, live(other) if phase.text_learns else condition) if anchored else None
        return loss_of(mine, sampler, objective, condition, anchor)

    def after_step() -> None:
        if TOKEN in phase.learns and embedding is not None:
            guard_norms(embedding.rows, largest)

    factor = rate_factor(task.params.optimiser, phase.steps)
    turn = _turns(task.params.tuning.token_share, parameters) if task.params.method == "joint" else None
    return Stretch(phase, parameters, enter, after_step, factor, rates, frozenset({_ROWS}), turn)


def _learners(
    mine: Components, task: Task, phase: Phase, embedding: tokens.PlaceholderEmbedding | None
) -> dict[str, nn.Parameter]:
    """What learns in a phase, by name: `<target>.<branch>.<side>`, and the token's rows."""
    found: dict[str, nn.Parameter] = {}
    if FACTORS in phase.learns:
        found = inject.trainable(mine.unet) | inject.trainable(mine.text_encoder)
    if WEIGHTS in phase.learns:
        found |= whole_models(mine, _text_learns(task.params))
    if TOKEN in phase.learns and embedding is not None:
        found[_ROWS] = embedding.rows
    return found


def _turns(share: float | None, parameters: Mapping[str, nn.Parameter]) -> Callable[[int], Collection[str]] | None:
    """Which parameters learn in a step of method `joint`; None where all do in every step."""
    if share is None:
        return None
    factors = parameters.keys() - {_ROWS}
    return lambda step: {_ROWS} if TOKEN in turns(share, step) else factors


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


def predictor(mine: Components) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The UNet as a function of noisy latents, timesteps and conditioning."""

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        noisy = noisy.to(conditioning.dtype).contiguous(memory_format=torch.channels_last)
        return cast(Tensor, mine.unet(noisy, timesteps, conditioning, return_dict=False)[0])

    return predict


def base_prediction(mine: Components, condition: Condition) -> Anchor:
    """What the base itself says of noisy latents, timesteps and captions, with what is learnt switched off."""
    predict = predictor(mine)

    @torch.no_grad()
    def anchor(noisy: Tensor, timesteps: Tensor, captions: Sequence[str]) -> Tensor:
        models = (mine.unet, mine.text_encoder)
        try:
            for model in models:
                inject.set_weights(model, {BRANCH: 0.0})
            return predict(noisy, timesteps, condition(captions))
        finally:
            for model in models:
                inject.set_weights(model, {BRANCH: 1.0})

    return anchor


def loss_of(
    mine: Components, sampler: Sampler, objective: Objective, condition: Condition, anchor: Anchor | None
) -> LossAt:
    """The loss of a step: instances and priors go through the UNet together.

    Args:
        mine: The base, with what is learnt.
        sampler: Gives the batches.
        objective: What is minimised.
        condition: Captions to what the UNet reads.
        anchor: Gives the priors' targets; None where they are those of their pictures.
    """
    schedule, predict = objective.schedule, predictor(mine)

    def loss_at(step: int) -> Tensor:
        batch = moved(sampler.batch(step), mine.unet.device)
        noisy = noised(schedule, batch.latents, batch.shown, batch.timesteps)
        target = target_of(schedule, batch.latents, batch.noise, batch.timesteps)
        if anchor is not None:
            own = batch.instances
            said = anchor(noisy[own:], batch.timesteps[own:], batch.captions[own:])
            target = torch.cat([target[:own], said.to(target)])
        prediction = predict(noisy, batch.timesteps, condition(batch.captions))
        return (batch.weights * distances(prediction, target, objective.huber_delta, batch.pixel_weights)).sum()

    return loss_at
