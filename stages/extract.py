"""`lora-pipe extract`: a training run's result becomes a portable adapter."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_pipeline.params import load_params
from stages._stage import PARAMS, entry, stage

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json
    from lora_pipeline.params import ConceptParams


def extract(
    concept: Annotated[str, typer.Option(help="A concept of params.yaml.")],
    tuned: Annotated[Path, typer.Option(help="The folder `train` wrote.")],
    base: Annotated[Path, typer.Option(help="The base it was trained on, a diffusers folder.")],
    out: Annotated[Path, typer.Option(help="The adapter to write.")],
) -> None:
    """Take the adapter out of a training run, cut to a rank if asked to, with its provenance.

    Examples:

        lora-pipe extract --concept zorp --tuned models/tuned/zorp --base models/base --out zorp.safetensors

        dvc repro extract@zorp

        dvc repro --single-item --force extract@zorp
    """
    from lora_pipeline.adapters import load_adapter, save_adapter
    from lora_pipeline.adapters.composition import parents
    from lora_pipeline.adapters.extraction import extract as take
    from lora_pipeline.adapters.fingerprint import base_fingerprint

    def settings() -> ConceptParams:
        return entry(load_params(PARAMS).concepts, "concepts", concept)

    section = settings()
    source = tuned / "tuned.safetensors"
    with stage(
        "extract", concept, out=out, inputs=[source, base], section=lambda: settings().model_dump(mode="json")
    ) as run:
        trained = load_adapter(source)
        provenance: dict[str, Json] = {
            "code": version("lora-pipeline"),
            "kind": "adapter",
            "params": section.model_dump(mode="json"),
            "parents": parents([("tuned", trained, 1.0)]),
        }
        extraction = take(trained, base_fingerprint(base), section.extract.rank, provenance)
        save_adapter(extraction.adapter, run.building)
        run.tracker.metric("residual", extraction.residual, 0)
    if extraction.residual:
        typer.echo(f"{out}: rank {section.extract.rank} loses {extraction.residual:.1%} of the change")
