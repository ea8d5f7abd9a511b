"""`lora-pipe priors`: the base draws pictures of a concept's class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.params import load_params
from stages._stage import PARAMS, entry, project_root, stage

CACHE = Path(".work/priors-cache")


def priors(
    concept: Annotated[str, typer.Option(help="A concept of params.yaml.")],
    base: Annotated[Path, typer.Option(help="The base that draws, a diffusers folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Draw pictures of a concept's class, which keep training from forgetting it; more of them cost only the new.

    Examples:

        lora-pipe priors --concept zorp --base models/base --out data/priors/zorp

        dvc repro priors@zorp

        dvc exp run --set-param concepts.zorp.priors.count=96 priors@zorp
    """
    from lora_pipeline.pretrained.components import load_components
    from lora_pipeline.rendering.priors import cache_folder, write_priors

    def settings() -> dict[str, object]:
        params = load_params(PARAMS)
        section = entry(params.concepts, "concepts", concept).priors
        return {"seed": params.seed, **section.model_dump(mode="json")}

    params = load_params(PARAMS)
    section = entry(params.concepts, "concepts", concept).priors
    with stage("priors", concept, out=out, inputs=[base], section=settings) as run:
        cache = cache_folder(project_root() / CACHE, base, section, params.seed)
        with run.progress(section.count, "pictures") as advance:
            write_priors(load_components(base), section, params.seed, cache, run.building, advance)
        run.tracker.metric("pictures", section.count, 0)
