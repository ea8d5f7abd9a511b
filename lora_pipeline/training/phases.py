"""The methods, as data: which parameters learn, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_pipeline.errors import ParamsError

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams

INVERSION, TUNING = "inversion", "tuning"
METHODS = {
    "ti": (INVERSION,), "lora": (TUNING,), "dreambooth": (TUNING,), "pti": (INVERSION, TUNING), "joint": (TUNING,),
    "full": (TUNING,),
}  # fmt: skip
TOKEN, FACTORS, WEIGHTS = "token", "factors", "weights"


@dataclass(frozen=True)
class Phase:
    """A stretch of steps over one set of parameters.

    Args:
        name: `inversion` or `tuning`.
        steps: How many.
        learning_rate: The peak.
        text_learns: Whether the text encoder's outputs change within the phase; else they are computed once.
        prior_weight: 0 in inversion: class captions do not hold the placeholder, so priors could teach it nothing.
        caption_dropout: The share of captions left empty, in [0, 1]; 0 in inversion, for the same reason.
        window: [from, to]: which shares of the noise levels are learnt from, in [0, 1].
        learns: Of `TOKEN`, the placeholder's rows, `FACTORS`, and `WEIGHTS`, the base's own.
        kept_tags: How many parts of a caption stay in front while the others are shuffled; None shuffles none.
    """

    name: str
    steps: int
    learning_rate: float
    text_learns: bool
    prior_weight: float
    caption_dropout: float
    window: Sequence[float]
    learns: frozenset[str] = frozenset({FACTORS})
    kept_tags: int | None = None


def phases_of(params: TrainParams) -> tuple[Phase, ...]:
    """The phases of a method, without those of no steps.

    Raises:
        ParamsError: An unknown method, or one that would not take a single step.
    """
    if params.method not in METHODS:
        raise ParamsError("method", f"{params.method!r} is no method", f"use one of {', '.join(METHODS)}")
    tuned = tuned_by(params)
    kept_tags = params.captions.keep_tags if params.captions.shuffle else None
    known = {
        INVERSION: Phase(
            INVERSION,
            params.inversion.steps,
            params.inversion.learning_rate,
            True,
            0.0,
            0.0,
            params.inversion.timesteps,
            frozenset({TOKEN}),
            kept_tags,
        ),
        TUNING: Phase(
            TUNING,
            params.tuning.steps,
            params.tuning.learning_rate,
            bool(params.adapter.text_encoder_targets) or TOKEN in tuned,
            params.prior.weight,
            params.captions.dropout,
            params.tuning.timesteps,
            tuned,
            kept_tags,
        ),
    }
    for name in METHODS[params.method]:
        if known[name].steps < 1:
            problem = f"{known[name].steps}, and method {params.method} needs this phase"
            raise ParamsError(f"{name}.steps", problem, "use 1 or more, or another method")
    return tuple(known[name] for name in METHODS[params.method])


def tuned_by(params: TrainParams) -> frozenset[str]:
    """What learns in the tuning phase: the token too where it has a learning rate there.

    Raises:
        ParamsError: `joint` without one, or a method that has no token to go on with.
    """
    rate = params.tuning.token_learning_rate
    if params.method == "joint" and rate is None:
        fix = "give one, such as 2.0e-2, or use method pti"
        raise ParamsError("tuning.token_learning_rate", "is null, and method joint learns the token too", fix)
    if params.method not in ("joint", "pti") and rate is not None:
        problem = f"is {rate:g}, and method {params.method} does not learn the token there"
        raise ParamsError("tuning.token_learning_rate", problem, "write null, or use method joint or pti")
    if params.method != "joint" and params.tuning.token_share is not None:
        raise ParamsError("tuning.token_share", f"is for method joint, not {params.method}", "write null")
    if params.method == "full":
        return frozenset({WEIGHTS})
    return frozenset({FACTORS, TOKEN} if rate is not None else {FACTORS})


def turns(share: float | None, step: int) -> frozenset[str]:
    """What learns in a step of method `joint`.

    Args:
        share: Of the steps that are the token's alone, spread evenly, in [0, 1]; None lets both learn in all of them.
        step: From 0.
    """
    if share is None:
        return frozenset({TOKEN, FACTORS})
    return frozenset({TOKEN if int((step + 1) * share) > int(step * share) else FACTORS})
