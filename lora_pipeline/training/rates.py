"""Who learns how fast: factors of the phase's learning rate by parameter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lora_pipeline.adapters.targets import MODELS, TEXT_ENCODER_2, UNET, root
from lora_pipeline.errors import ParamsError
from lora_pipeline.pretrained.schedules import rate_factors

if TYPE_CHECKING:
    from lora_pipeline.params.training import OptimiserParams, TuningParams


def rates_of(names: Iterable[str], params: TuningParams) -> dict[str, float]:
    """Factors of `tuning.learning_rate`.

    Args:
        names: Of parameters: `<target>.<branch>.<side>`, or others, which are token rows.
        params: The section `tuning`. Globs of `learning_rates` are over layer paths as those of `unet_targets` are;
            where several match a layer, their factors multiply. `lora_plus_ratio` (Hayou et al. 2024,
            arXiv:2402.12354) is for the side of the factors that starts at zero.

    Returns:
        By parameter; those of 0 do not learn.

    Raises:
        ParamsError: A glob that matches no layer, or nothing that would learn.
    """
    names = list(names)
    paths = {name: _path(name) for name in names}
    for glob in params.learning_rates:
        if not any(path is not None and fnmatchcase(path, glob) for path in paths.values()):
            example = next((path for path in paths.values() if path), "none")
            problem = f"{glob!r} matches no layer that learns"
            raise ParamsError("tuning.learning_rates", problem, f"use names like {example!r}")
    rates = {name: _rate(name, paths[name], params) for name in names}
    if names and not any(rates.values()):
        raise ParamsError("tuning.learning_rates", "is 0 for every layer", "leave some of them to learn")
    return rates


def _rate(name: str, path: str | None, params: TuningParams) -> float:
    if path is None:
        own = params.token_learning_rate
        return 1.0 if own is None else own / params.learning_rate
    own = None if name.startswith(root(UNET)) else _of_encoder(name, params.text_encoder_learning_rate)
    side = params.lora_plus_ratio if name.rpartition(".")[2].startswith("up") else 1.0
    factors = [factor for glob, factor in params.learning_rates.items() if fnmatchcase(path, glob)]
    return math.prod(factors) * side * (1.0 if own is None else own / params.learning_rate)


def _of_encoder(name: str, given: float | Sequence[float] | None) -> float | None:
    """A text encoder's own learning rate, of one for all or of one for each."""
    return given[name.startswith(root(TEXT_ENCODER_2))] if isinstance(given, Sequence) else given


def _path(name: str) -> str | None:
    """The layer's path below its model, or None for what is no layer's."""
    start = next((root(prefix) for prefix in MODELS if name.startswith(root(prefix))), None)
    return None if start is None else name.removeprefix(start).rsplit(".", 2)[0]


def rate_factor(params: OptimiserParams, steps: int) -> Callable[[int, int], float]:
    """The factor of the learning rate at a step of a phase of so many steps.

    Raises:
        ParamsError: See `rate_factors`; tried for `steps`.
    """

    @functools.cache
    def factors(steps: int) -> Callable[[int], float]:
        return rate_factors(params.schedule, params.warm_up, params.schedule_options, steps)

    factors(steps)
    return lambda step, steps: factors(steps)(step)
