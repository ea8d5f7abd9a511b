"""Learnt weights of a blend: what they are learnt from, on a command line and in params.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lora_pipeline.errors import UsageError

if TYPE_CHECKING:
    from lora_pipeline.adapters.composition import Composition, Part
    from lora_pipeline.adapters.recipes import Recipe
    from lora_pipeline.params import BlendParams
    from lora_pipeline.training.fit import Fit
    from stages._stage import Stage
    from stages._weighted import Weighted

# By hand; in params.yaml each is written out.
DEFAULTS: Mapping[str, Any] = {"granularity": "block", "draws": 6, "steps": 200, "learning_rate": 0.02,
                               "regularisation": 0.01}  # fmt: skip


def fit_of_blend(blend: BlendParams, seed: int) -> Fit | None:
    """What a section of params.yaml asks for; None where nothing is learnt."""
    from lora_pipeline.training.fit import Fit

    return Fit(blend.method, **blend.fit.model_dump(), seed=seed) if blend.fit is not None else None


def fit_by_hand(
    adapters: Sequence[Weighted], options: Mapping[str, Any], prompts: Sequence[str], learning: Mapping[str, Any]
) -> Fit | None:
    """What the command line asks for; None where nothing is learnt.

    Args:
        adapters: Of the blend.
        options: Of `compose`: its method and seed count here.
        prompts: `ADAPTER=PROMPT` or `ONE+OTHER=PROMPT` each.
        learning: Those of `DEFAULTS` that were given.

    Raises:
        UsageError: An option of learning with another method, or a prompt of another form.
        ParamsError: See `Fit`.
    """
    from lora_pipeline.training.fit import GRANULARITIES, Fit

    method = options.get("method", "sum")
    if method not in GRANULARITIES:
        if prompts or learning:
            name = "prompt" if prompts else min(learning).replace("_", "-")
            fix = f"use --method {' or '.join(GRANULARITIES)}, or leave it out"
            raise UsageError(f"--{name}", f"is for learnt weights, and method {method} learns none", fix)
        return None
    fit = Fit(method, prompts=_by_adapter(prompts), **{**DEFAULTS, **learning}, seed=options.get("seed", 0))
    fit.scenes([path.stem for path, _ in adapters])
    return fit


def _by_adapter(prompts: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in prompts:
        name, equals, prompt = text.partition("=")
        if not (name and equals and prompt.strip()):
            raise UsageError(text, "names no adapter and prompt", 'write it like --prompt "zorp=a <zorp> creature"')
        found.setdefault(name, []).append(prompt.strip())
    return found


def learn(base: Path, parts: Sequence[Part], recipe: Recipe, fit: Fit, run: Stage) -> Composition:
    """Learns the weights, tells them, and blends; the loss goes to the tracker."""
    from lora_pipeline.adapters.adapter import check_base
    from lora_pipeline.adapters.fingerprint import base_fingerprint
    from lora_pipeline.pretrained.components import load_components
    from lora_pipeline.training.blending import learnt_blend

    fingerprint = base_fingerprint(base)
    for name, adapter, _ in parts:
        check_base(name, adapter, fingerprint)
    with run.progress(fit.work(), "steps") as advance:

        def report(step: int, loss: float | None) -> None:
            advance(step)
            if loss is not None:
                run.tracker.metric("loss", loss, step)

        found = learnt_blend(load_components(base), parts, recipe, fit, report)
    for name, weights in found.weights.items():
        typer.echo(f"{name}: {', '.join(f'{place} {weight:.3f}' for place, weight in weights.items())}")
    return found.composition
