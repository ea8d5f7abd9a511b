"""`lora-pipe base`: the embedded base and its judge, made and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np

    from lora_pipeline.toyworld.fitting import Report

EVERY = 100  # steps between lines
GUIDANCE_SCALE = 3.0
STEPS = 20
Work = Annotated[Path, typer.Option(help="Where pictures and checkpoints are kept between tries.")]


def log(name: str) -> Report:
    """A reporter that prints a line every hundred steps."""

    def report(step: int, loss: float) -> None:
        if step % EVERY == 0:
            typer.echo(f"{name} step {step} loss {loss:.4f}", err=True)

    return report


def base_train(
    out: Annotated[Path, typer.Option(help="The base folder to write.")] = Path("models/base"),
    work: Work = Path(".work/base"),
) -> None:
    """Train the embedded base from seeds; a stopped run goes on at its last checkpoint.

    Examples:

        lora-pipe base train

        lora-pipe base train --out models/base --work .work/base

        lora-pipe base train --out /tmp/base && lora-pipe base score --base /tmp/base
    """
    from lora_pipeline.toyworld.base import RECIPE, train_base

    train_base(work, out, RECIPE, log)


def base_judge(
    base: Annotated[Path, typer.Option(help="The base whose autoencoder the judge must see through.")] = Path(
        "models/base"
    ),
    out: Annotated[Path, typer.Option(help="The judge folder to write.")] = Path("models/judge"),
    work: Work = Path(".work/judge"),
) -> None:
    """Train the judge that reads toy pictures, and write it with its card.

    Examples:

        lora-pipe base judge

        lora-pipe base judge --base models/base --out models/judge

        lora-pipe base judge --out /tmp/judge --work /tmp/judge-work
    """
    from lora_pipeline.pretrained.components import load_components
    from lora_pipeline.toyworld.autoencoder import reconstructed
    from lora_pipeline.toyworld.judge_training import train_judge

    vae = load_components(base).vae
    train_judge(work, out, lambda images: reconstructed(vae, images), log("judge"))


def base_score(
    base: Annotated[Path, typer.Option(help="The base to score.")] = Path("models/base"),
    judge: Annotated[Path, typer.Option(help="The judge folder.")] = Path("models/judge"),
    count: Annotated[int, typer.Option(min=8, help="How many random prompts.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Which random prompts.")] = 0,
    card: Annotated[bool, typer.Option(help="Write the numbers into the base's MODEL_CARD.md.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how often the base paints what random prompts ask for.

    Examples:

        lora-pipe base score

        lora-pipe base score --count 100 --json

        lora-pipe base score --base models/base --card
    """
    import numpy as np

    from lora_pipeline.pretrained.components import load_components
    from lora_pipeline.rendering.sampling import pictures_at_once, sample
    from lora_pipeline.toyworld.autoencoder import reconstructed
    from lora_pipeline.toyworld.card import table, write_card
    from lora_pipeline.toyworld.judge import load_judge
    from lora_pipeline.toyworld.scoring import score_base, score_drawings

    components, reader = load_components(base), load_judge(judge)

    def render(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return np.asarray(
            sample(
                components, prompts, seeds, steps=STEPS, guidance_scale=GUIDANCE_SCALE, negative_prompt="",
                weighting=None, batch=pictures_at_once(components),
            )
        )  # fmt: skip

    scores = {
        "painted": score_base(render, reader, count, seed),
        "drawn": score_drawings(reader, count, seed),
        "rebuilt": score_drawings(reader, count, seed, lambda images: reconstructed(components.vae, images)),
    }
    if card:
        write_card(base, scores, count, seed)
    typer.echo(json.dumps(scores, indent=2, sort_keys=True) if as_json else table(scores))
