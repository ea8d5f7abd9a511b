"""The methods, as data: which parameters learn, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_pipeline.errors import ParamsError

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams

INVERSION, TUNING = "inversion", "tuning"
METHODS = {"ti": (INVERSION,), "lora": (TUNING,), "dreambooth": (TUNING,), "pti": (INVERSION, TUNING)}


@dataclass(frozen=True)
class Phase:
    """A stretch of steps over one set of parameters.

    Args:
        name: `inversion` learns the placeholder's rows, `tuning` the factors. Nothing learns in both.
        steps: How many.
        learning_rate: The peak.
        text_learns: Whether the text encoder's outputs change within the phase; else they are computed once.
        prior_weight: 0 in inversion: class captions do not hold the placeholder, so priors could teach it nothing.
        caption_dropout: The share of captions left empty, in [0, 1]; 0 in inversion, for the same reason.
        kept_tags: How many parts of a caption stay in front while the others are shuffled; None shuffles none.
    """

    name: str
    steps: int
    learning_rate: float
    text_learns: bool
    prior_weight: float
    caption_dropout: float
    kept_tags: int | None = None


def phases_of(params: TrainParams) -> tuple[Phase, ...]:
    """The phases of a method, without those of no steps.

    Raises:
        ParamsError: An unknown method, or one that would not take a single step.
    """
    if params.method not in METHODS:
        raise ParamsError("method", f"{params.method!r} is no method", f"use one of {', '.join(METHODS)}")
    kept_tags = params.captions.keep_tags if params.captions.shuffle else None
    inversion = params.inversion
    known = {
        INVERSION: Phase(INVERSION, inversion.steps, inversion.learning_rate, True, 0.0, 0.0, kept_tags),
        TUNING: Phase(
            TUNING,
            params.tuning.steps,
            params.tuning.learning_rate,
            bool(params.adapter.text_encoder_targets),
            params.prior.weight,
            params.captions.dropout,
            kept_tags,
        ),
    }
    for name in METHODS[params.method]:
        if known[name].steps < 1:
            problem = f"{known[name].steps}, and method {params.method} needs this phase"
            raise ParamsError(f"{name}.steps", problem, "use 1 or more, or another method")
    return tuple(known[name] for name in METHODS[params.method])
