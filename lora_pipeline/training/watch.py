"""Losses that have gone wrong: where, and what to lower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from torch import nn

from lora_pipeline.errors import ParamsError

WINDOW, TIMES = 20, 10.0


def check_divergence(phase: str, losses: Sequence[float], opening: int) -> None:
    """Refuses losses whose last 20 have a median over ten times that of the first 20.

    Medians, because a loss at one noise level may be a hundred times that at another.

    Args:
        phase: Its name.
        losses: All so far.
        opening: How many of them were before the phase.

    Raises:
        ParamsError: It diverged.
    """
    done = len(losses) - opening
    if done < 2 * WINDOW:
        return
    first, last = median(losses[opening : opening + WINDOW]), median(losses[-WINDOW:])
    if last > TIMES * first:
        problem = f"the loss diverges: {first:.3g} at first, {last:.3g} around step {done} of the {phase}"
        raise ParamsError(f"{phase}.learning_rate", problem, "use a smaller one, or a longer optimiser.warm_up")


def not_finite(phase: str, step: int, found: str, layer: str | None, *, half: bool) -> ParamsError:
    """The error for a loss or a gradient that is not finite.

    Args:
        phase: Its name.
        step: From 1.
        found: What is not finite.
        layer: Whose gradient was not finite first.
        half: Whether the base computes in float16.
    """
    place = f", in {layer} first" if layer else ""
    fix = "use a smaller one" + (", or engine.precision bfloat16" if half else "")
    return ParamsError(f"{phase}.learning_rate", f"{found} at step {step} of the {phase}{place}", fix)


def first_not_finite(parameters: Mapping[str, nn.Parameter], compute: Callable[[], object]) -> str | None:
    """The parameter whose gradient is the first that is not finite while `compute` runs backwards."""
    seen: list[str] = []

    def watching(name: str) -> Callable[[nn.Parameter], None]:
        def look(parameter: nn.Parameter) -> None:
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                seen.append(name)

        return look

    hooks = [each.register_post_accumulate_grad_hook(watching(name)) for name, each in parameters.items()]
    try:
        compute()
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0] if seen else None
