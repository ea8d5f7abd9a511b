"""`lora-pipe preprocess`: raw pictures become squares with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_pipeline.params import load_params
from stages._stage import PARAMS, entry, stage


def preprocess(
    concept: Annotated[str, typer.Option(help="A concept of params.yaml.")],
    images: Annotated[Path, typer.Option(help="The folder of its raw pictures.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Turn a folder of pictures into squares of one size with checked captions.

    Examples:

        lora-pipe preprocess --concept zorp --images data/raw/zorp --out data/processed/zorp

        dvc repro preprocess@zorp

        dvc repro --single-item --force preprocess@zorp
    """
    from lora_pipeline.data.images import list_pictures
    from lora_pipeline.data.preprocessing import preprocess as prepare

    def settings() -> dict[str, object]:
        params = load_params(PARAMS)
        section = entry(params.concepts, "concepts", concept)
        told = section.model_dump(mode="json", include={"kind", "placeholder_token", "class_noun", "preprocess"})
        return {"seed": params.seed, **told}

    params = load_params(PARAMS)
    section = entry(params.concepts, "concepts", concept)
    total = len(list_pictures(images))
    with stage("preprocess", concept, out=out, inputs=[images], section=settings) as run:
        run.building.mkdir(parents=True)
        with run.progress(total, "pictures") as advance:
            count = prepare(images, run.building, section, params.seed, advance)
        run.tracker.metric("pictures", count, 0)
