"""Personalising a base: a concept's pictures in, factors, token rows or weights out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2
from lora_pipeline.data.dataset import Example
from lora_pipeline.injection.chance import Chance
from lora_pipeline.pretrained.adapted import strip
from lora_pipeline.pretrained.encoding import tokenize
from lora_pipeline.pretrained.engine import checkpointed, compiled
from lora_pipeline.pretrained.inpainting import channels_given
from lora_pipeline.training.cache import TensorCache
from lora_pipeline.training.checks import check_encoders, check_task, located, repeats_of
from lora_pipeline.training.encodings import Encoder, anchors_of
from lora_pipeline.training.learnables import (
    add_branches,
    add_token,
    chance_of,
    factors_of,
    magnitudes_of,
    rows_of,
)
from lora_pipeline.training.loop import Report, StepLoss, train
from lora_pipeline.training.phases import FACTORS, TOKEN, WEIGHTS, phases_of
from lora_pipeline.training.placement import placed
from lora_pipeline.training.processes import together
from lora_pipeline.training.room import check_room
from lora_pipeline.training.stretches import Bench, Pools, stretch_of
from lora_pipeline.training.validation import Validation, set_aside
from lora_pipeline.training.whole import learnt_weights, own_copies

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json
    from lora_pipeline.params import TrainParams
    from lora_pipeline.pretrained.components import Components

Say = Callable[[str], None]


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
        validation: The loss on pictures that were set aside, of the steps it was looked at.
        weights: The base's own as they are now, by canonical name (see `adapters.weights`); of method `full` alone.
        embeddings_2: As `embeddings`, of SDXL's second text encoder.
        magnitudes: Of kind `dora`, by target.
    """

    factors: Mapping[str, LoraFactors]
    embeddings: Mapping[str, Tensor]
    losses: Sequence[StepLoss]
    validation: Sequence[StepLoss] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings_2: Mapping[str, Tensor] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)

    def adapter(self, provenance: Mapping[str, Json]) -> Adapter:
        """Factors and rows as an adapter."""
        return Adapter(self.factors, self.embeddings, provenance, {}, self.embeddings_2, self.magnitudes)


def tune(
    components: Components,
    task: Task,
    work: Path,
    report: Report,
    say: Say = lambda _: None,
    cache: Path | None = None,
    look: Callable[[int, Components], None] | None = None,
) -> Tuned:
    """Trains; a call that was killed goes on where its last checkpoint is and ends in the same bytes.

    Args:
        components: The base. It comes back as it was.
        task: What is to be learnt.
        work: Where checkpoints are kept, for this base and task alone; they stay there.
        report: Told the number of steps done and `loss` and `gradient_norm`, after each; `validation_loss` sometimes.
        say: Told what a user should know.
        cache: A folder of encodings that runs may share; None encodes everything anew, to the same bytes.
        look: Shown the base with what is learnt so far, every `samples.every` steps.

    Raises:
        ParamsError: A value that cannot be for this base and these pictures; or the loss stopped being finite, or
            diverges.
        CorruptError: A damaged picture, a caption without the placeholder, a damaged checkpoint.
        MissingError: The optimiser's package is not installed.
        ResourceError: No space left for a checkpoint.
    """
    params, engine = task.params, task.params.engine
    with (
        located(task.name),
        together() as crew,
        placed(components, engine.precision),
        private(_copied(components, params)) as mine,
        checkpointed(mine.unet, engine.gradient_checkpointing),
    ):
        phases = phases_of(params)
        check_task(task, phases, mine.tokenizer)
        check_encoders(params, len(mine.readers))
        learning = frozenset[str]().union(*(phase.learns for phase in phases))
        embeddings = add_token(mine, task) if TOKEN in learning else {}
        chance = chance_of(params.adapter, task.seed)
        if FACTORS in learning:
            add_branches(mine, task, chance)
        _check_lengths(mine, task)
        encodings = TensorCache(cache)
        pools = _pools(mine, task, encodings, say)
        validation = Validation(params.validation.every, phases, work)
        bench = Bench(mine, components, params, task.seed, pools, embeddings, encodings, validation, say, chance)
        stretches = [stretch_of(bench, phase) for phase in phases]
        check_room(mine, params, stretches, pools.own[0].mean.shape, work if crew.first else None, say)
        told = _looking(report, look, mine, params.samples.every) if look and crew.first else report
        with compiled(mine.unet, engine.compile):
            losses = train(stretches, work, params, _still(chance, validation.watching(told)), crew, say)
        encodings.shrink()
        weights = learnt_weights(mine, _text_learns(params)) if WEIGHTS in learning else {}
        rows = [rows_of(embeddings.get(encoder)) for encoder in (TEXT_ENCODER, TEXT_ENCODER_2)]
        magnitudes = magnitudes_of(mine)
        return Tuned(factors_of(mine), rows[0], losses, validation.losses(), weights, rows[1], magnitudes)


def _still(chance: Chance | None, report: Report) -> Report:
    """A report that looks at all of what is learnt."""

    def told(step: int, values: dict[str, float]) -> None:
        if chance is not None:
            chance.batch = None
        report(step, values)

    return told


def _looking(report: Report, look: Callable[[int, Components], None], mine: Components, every: int) -> Report:
    def told(step: int, values: dict[str, float]) -> None:
        report(step, values)
        if every and step % every == 0:
            with torch.no_grad():
                look(step, mine)

    return told


def _text_learns(params: TrainParams) -> bool:
    return bool(params.adapter.text_encoder_targets)


def _copied(components: Components, params: TrainParams) -> Components:
    if params.method != "full":
        return components
    return own_copies(components, params.engine.precision, _text_learns(params))


def _pools(mine: Components, task: Task, encodings: TensorCache, say: Say) -> Pools:
    """Pictures by their use; where there are no class pictures the base is asked about the concept's own."""
    params, pictures, looks = task.params, task.params.pictures, task.params.validation
    repeated = list(zip(task.examples, repeats_of(task.examples, pictures.repeats), strict=True))
    own, aside = set_aside(repeated, looks.pictures if looks.every else 0, task.seed)
    keep = channels_given(mine.unet, mine.vae) > 0
    if keep:
        say("holes are drawn anew in every step, so what the base is given of the pictures is encoded in every step")
    encoder = Encoder(mine.vae, encodings, say, params.objective.mask_background, keep)
    learnt = encoder.examples([example for example, _ in own], pictures.flip)
    learnt = [replace(each, repeats=times) for each, (_, times) in zip(learnt, own, strict=True)]
    plain = Encoder(mine.vae, encodings, say, keep=keep)
    of_class = plain.examples(task.priors)
    if not of_class and task.token is not None and params.prior.target == "prediction":
        of_class = anchors_of(learnt, task.token)
    return Pools(learnt, of_class, plain.examples([example for example, _ in aside]))


@contextmanager
def private(components: Components) -> Iterator[Components]:
    """Inside, a base with tokenizers of its own; afterwards nothing is left in the models."""
    mine = components.with_own_tokenizers()
    mine.unet.to(memory_format=torch.channels_last)
    try:
        yield mine
    finally:
        strip(mine)


def _check_lengths(mine: Components, task: Task) -> None:
    """Refuses captions that are too long."""
    for tokenizer, _ in mine.readers.values():
        tokenize(tokenizer, [example.caption for example in (*task.examples, *task.priors)])
