"""`lora-pipe train`: a concept is learnt from its pictures."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_pipeline.params import load_params
from stages._stage import PARAMS, entry, project_root, stage
from stages._tuned import draw_samples, keep_samples, sample_path, write_tuned

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json
    from lora_pipeline.pretrained.components import Components

ENCODINGS = Path(".work/encodings")


def train(
    concept: Annotated[str, typer.Option(help="A concept of params.yaml.")],
    base: Annotated[Path, typer.Option(help="The base to train on, a diffusers folder.")],
    images: Annotated[Path, typer.Option(help="The folder `preprocess` wrote.")],
    priors: Annotated[Path, typer.Option(help="The folder `priors` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Learn a concept; a killed run goes on at its last checkpoint and ends in the same bytes.

    Examples:

        lora-pipe train --concept zorp --base models/base --images processed/zorp --priors priors/zorp --out zorp

        dvc repro train@zorp

        dvc repro --single-item --force train@zorp
    """
    from lora_pipeline.adapters.fingerprint import base_fingerprint
    from lora_pipeline.data.dataset import content_hash, read_examples
    from lora_pipeline.pretrained.components import load_components
    from lora_pipeline.training.memory import used_bytes
    from lora_pipeline.training.phases import phases_of
    from lora_pipeline.training.processes import rank
    from lora_pipeline.training.tuning import Task, tune

    def settings() -> dict[str, Json]:
        params = load_params(PARAMS)
        section = entry(params.concepts, "concepts", concept)
        told = section.model_dump(mode="json", include={"kind", "placeholder_token", "class_noun", "priors", "train"})
        return {"seed": params.seed, **told}

    params = load_params(PARAMS)
    section = entry(params.concepts, "concepts", concept)

    def task_of() -> Task:
        pictures = read_examples(images), read_examples(priors)
        return Task(concept, section.placeholder_token, *pictures, section.train, params.seed)

    if rank() > 0:  # the first process writes, and tells the others where it goes on
        tune(load_components(base), task_of(), out, lambda _, __: None)
        return

    def lasting() -> dict[str, Json]:
        return without_steps(settings())

    kept = None if section.train.method == "full" else lasting  # whose state is as large as three bases
    with stage("train", concept, out=out, inputs=[base, images, priors], section=settings, lasting=kept) as run:
        run.building.mkdir(parents=True)  # before hours of work, in case it cannot be
        task = task_of()
        components = load_components(base)
        total = sum(phase.steps for phase in phases_of(section.train))
        with run.progress(total, "steps") as advance:

            def report(step: int, values: dict[str, float]) -> None:
                advance(step, f"loss {values['loss']:.4g}, {used_bytes() / 1e9:.2g} GB")
                for name, value in values.items():
                    run.tracker.metric(name, value, step)

            def look(step: int, now: Components) -> None:
                draw_samples(now, section, sample_path(run.work, step))

            cache = project_root() / ENCODINGS
            tuned = tune(components, task, run.work, report, lambda line: typer.echo(line, err=True), cache, look)
        provenance: dict[str, Json] = {
            "base": base_fingerprint(base),
            "code": version("lora-pipeline"),
            "data": content_hash(task.examples),
            "kind": "tuned",
            "params": settings(),
            "parents": [],
            "priors": content_hash(task.priors),
        }
        drawing = write_tuned(tuned, provenance, base, components, run.building)
        draw_samples(drawing, section, run.building / "samples.png")
        keep_samples(run.work, run.building)


def without_steps(settings: dict[str, Json]) -> dict[str, Json]:
    """What a run of another length, or one told to keep its state more often, has in common with this one."""
    train: dict[str, Json] = dict(settings["train"])  # type: ignore[arg-type]
    for phase in ("inversion", "tuning"):
        values: dict[str, Json] = dict(train[phase])  # type: ignore[arg-type]
        train[phase] = {key: value for key, value in values.items() if key != "steps"}
    return {**settings, "train": {key: value for key, value in train.items() if key != "checkpoint_every"}}
