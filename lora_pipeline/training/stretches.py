"""The phases of a task as stretches of the loop: which parameters learn, from which losses, how fast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from lora_pipeline.adapters.targets import TEXT_ENCODER
from lora_pipeline.injection import inject, tokens
from lora_pipeline.injection.chance import Chance
from lora_pipeline.pretrained.adapted import set_weights
from lora_pipeline.training.batches import Sampler
from lora_pipeline.training.conditioning import Condition, condition_of, live
from lora_pipeline.training.encodings import EncodedExample
from lora_pipeline.training.learner import LossAt, Stretch
from lora_pipeline.training.losses import BRANCH, base_prediction, batch_loss, loss_of, seen
from lora_pipeline.training.objective import objective_of
from lora_pipeline.training.optimisation import guard_norms
from lora_pipeline.training.phases import FACTORS, INVERSION, TOKEN, WEIGHTS, Phase, turns
from lora_pipeline.training.rates import rate_factor, rates_of
from lora_pipeline.training.validation import Validation, validation_batches
from lora_pipeline.training.whole import whole_models

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams
    from lora_pipeline.pretrained.components import Components
    from lora_pipeline.training.cache import TensorCache

_ROWS = "rows"


@dataclass(frozen=True)
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


@dataclass(frozen=True, eq=False)
class Bench:
    """What all stretches of a task work with.

    Args:
        mine: The base with what is learnt: beside its layers, or copies of its models.
        base: The base as it was; the same models where nothing was copied.
        params: How to train.
        seed: All draws depend on it.
        pools: Pictures.
        embeddings: The placeholder's rows by text encoder; none where the token does not learn.
        encodings: The text encoder's outputs of before.
        validation: Looks at pictures that are not learnt from.
        say: Told what a user should know.
        chance: What branches leave out while they learn.
    """

    mine: Components
    base: Components
    params: TrainParams
    seed: int
    pools: Pools
    embeddings: Mapping[str, tokens.PlaceholderEmbedding]
    encodings: TensorCache
    validation: Validation
    say: Callable[[str], None]
    chance: Chance | None = None

    def condition(self, phase: Phase) -> Condition:
        """Captions to what the UNet reads."""
        return condition_of(self.mine, phase, self.pools.captions(), self.encodings, self.say)


def stretch_of(bench: Bench, phase: Phase) -> Stretch:
    """A phase, ready for the loop.

    Raises:
        ParamsError, CorruptError: See `objective_of`, `rates_of` and `rate_factor`.
    """
    mine, params = bench.mine, bench.params
    objective = objective_of(params, phase, mine.scheduler)
    everything = _learners(bench, phase)
    rates = dict.fromkeys(everything, 1.0) if phase.name == INVERSION else rates_of(everything, params.tuning)
    parameters = {name: parameter for name, parameter in everything.items() if rates[name] > 0}
    for name in everything.keys() - parameters.keys():
        everything[name].requires_grad_(False)

    def enter() -> LossAt:
        set_weights(mine, {BRANCH: float(FACTORS in phase.learns)})
        condition = bench.condition(phase)
        anchored = phase.prior_weight > 0 and params.prior.target == "prediction"
        anchor = base_prediction(*_untouched(bench, phase, condition)) if anchored else None
        loss_in = batch_loss(mine, objective, condition, anchor)
        levels = objective.schedule.timesteps
        bench.validation.look = lambda: seen(
            batch_loss(mine, objective, condition, None), validation_batches(bench.pools.aside, levels)
        )
        pools = bench.pools.own, bench.pools.of_class
        return loss_of(loss_in, Sampler(phase, pools, params.batch_size, objective, bench.seed), bench.chance)

    factor = rate_factor(params.optimiser, phase.steps)
    rows = frozenset(map(row_name, bench.embeddings))
    lengths = frozenset(name for name in parameters if name.endswith(".magnitude"))
    turn = _turns(params.tuning.token_share, parameters, rows) if params.method == "joint" else None
    return Stretch(phase, parameters, enter, _guard(bench, phase), factor, rates, rows | lengths, turn)


def _untouched(bench: Bench, phase: Phase, condition: Condition) -> tuple[Components, Condition]:
    """The base that the class is held to, and how it is asked."""
    copied = bench.base.unet is not bench.mine.unet
    base = replace(bench.base, tokenizer=bench.mine.tokenizer) if copied else bench.mine
    return base, live(base) if phase.text_learns else condition


def _guard(bench: Bench, phase: Phase) -> Callable[[], None]:
    learning = list(bench.embeddings.values()) if TOKEN in phase.learns else []
    most_change = bench.params.adapter.max_norm if FACTORS in phase.learns else None
    largest = [float(embedding.weight.norm(dim=1).max()) for embedding in learning]

    def guard() -> None:
        if bench.chance is not None:
            bench.chance.batch = None
        for embedding, most in zip(learning, largest, strict=True):
            guard_norms(embedding.rows, most)
        if most_change is not None:
            for model in bench.mine.models.values():
                inject.hold(model, BRANCH, most_change)

    return guard


def _learners(bench: Bench, phase: Phase) -> dict[str, nn.Parameter]:
    """What learns in a phase, by name: `<target>.<branch>.<side>`, and `row_name`."""
    found: dict[str, nn.Parameter] = {}
    if FACTORS in phase.learns:
        for model in bench.mine.models.values():
            found |= inject.trainable(model)
    if WEIGHTS in phase.learns:
        found |= whole_models(bench.mine, bool(bench.params.adapter.text_encoder_targets))
    if TOKEN in phase.learns:
        found |= {row_name(encoder): embedding.rows for encoder, embedding in bench.embeddings.items()}
    return found


def row_name(encoder: str) -> str:
    """What the token's rows in a text encoder are called: `rows`, and `rows_2` in SDXL's second."""
    return f"{_ROWS}{encoder.removeprefix(TEXT_ENCODER)}"


def _turns(
    share: float | None, parameters: Mapping[str, nn.Parameter], rows: frozenset[str]
) -> Callable[[int], Collection[str]] | None:
    """Which parameters learn in a step of method `joint`; None where all do in every step."""
    if share is None:
        return None
    factors = parameters.keys() - rows
    return lambda step: rows if TOKEN in turns(share, step) else factors
