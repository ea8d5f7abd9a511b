"""`lora-pipe study`: the methods, measured over subjects and seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_pipeline.errors import UsageError
from lora_pipeline.keeping import WORK, locked
from lora_pipeline.params import Params, load_params, suggestion
from stages._stage import PARAMS, bar, entry, lines, project_root

if TYPE_CHECKING:
    from lora_pipeline.params import ConceptParams
    from stages._study import Laboratory, Measured
    from stages._study_table import Cells, Row


def study(
    subjects: Annotated[str, typer.Option(help="Mascots, with commas between.")] = "zorp,mimo",
    seeds: Annotated[int, typer.Option(min=1, help="Training runs of each arm.")] = 3,
    pictures: Annotated[
        int, typer.Option(min=8, max=9_992, help="Pictures a cell of the subject, and of the class; in eights.")
    ] = 48,
    judge: Annotated[Path, typer.Option(help="The judge folder.")] = Path("models/judge"),
    jobs: Annotated[int, typer.Option(min=1, help="Cells at once, a process each.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write what is printed to this file, too.")] = None,
) -> None:
    """Print a table of the methods over subjects and seeds, trained as params.yaml says of zorp.

    Every method takes the same number of optimiser steps. Similarity and leak are likeness to the pictures learnt from,
    by the judge; drift is from the base's pictures of the same prompts and seeds. Brackets are 95 % bootstrap intervals
    over seeds and pictures; of drift and diversity, over seeds. A stopped study goes on where it was; after a change of
    the code, remove .work/study first.

    Examples:

        lora-pipe study

        lora-pipe study --subjects zorp --seeds 1 --pictures 8 --json

        lora-pipe study --seeds 3 --pictures 48 --jobs 4 --out study.md
    """
    params = load_params(PARAMS)
    names = asked(subjects)
    root = project_root()
    with locked("study", root):
        from lora_pipeline.pretrained.components import load_components
        from lora_pipeline.toyworld.judge import load_judge
        from lora_pipeline.toyworld.scoring import JudgeScorer
        from stages._study import Laboratory
        from stages._study_table import rows_of

        base = Path(params.base)
        scorer = JudgeScorer(load_judge(judge))
        laboratory = Laboratory(load_components(base), scorer, base, judge, pictures, root / WORK / "study")
        numbers = range(params.seed, params.seed + seeds)
        if jobs > 1:
            measure_apart(laboratory, names, numbers, params, jobs)
        rows = rows_of(cells_of(laboratory, names, numbers, params), params.seed)
        text = text_of(rows, names, seeds, params, laboratory, as_json=as_json)
    typer.echo(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


def asked(subjects: str) -> list[str]:
    """The mascots' names.

    Raises:
        UsageError: There is no such mascot.
    """
    from lora_pipeline.toyworld.scene import MASCOTS

    names = list(dict.fromkeys(subjects.split(",")))
    for name in names:
        if name not in MASCOTS:
            raise UsageError("--subjects", f"{name!r} is no mascot", suggestion(name, MASCOTS))
    return names


def measure_apart(laboratory: Laboratory, names: list[str], seeds: range, params: Params, jobs: int) -> None:
    """Lets processes measure cells, and keep them; what all of them need is made before."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    from stages._study import ARMS, MODEL, anchors, measure_cell, pictures_of, priors_of, section_of

    model = entry(params.concepts, "concepts", MODEL)
    for name in names:
        section = section_of(model, name)
        priors_of(laboratory, section)
        for seed in seeds:
            anchors(laboratory, name, section, pictures_of(laboratory, section, seed), seed)
    cells = [(name, seed, arm) for name in names for arm in ARMS for seed in seeds]
    folders = laboratory.base, laboratory.judge, laboratory.pictures, laboratory.folder
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        asked = [pool.submit(measure_cell, folders, model, *cell) for cell in cells]
        for done, each in enumerate(as_completed(asked), 1):
            each.result()
            typer.echo(f"study: {done} of {len(cells)} cells", err=True)


def cells_of(
    laboratory: Laboratory, names: list[str], seeds: range, params: Params,
) -> dict[str, dict[str, Cells]]:  # fmt: skip
    """Subject to arm to measures, each (seeds, pictures)."""
    from stages._study import ARMS, MODEL, section_of

    model = entry(params.concepts, "concepts", MODEL)
    total, done = len(names) * len(seeds) * len(ARMS), 0
    cells: dict[str, dict[str, Cells]] = {}
    for name in names:
        section = section_of(model, name)
        gathered: dict[str, list[Measured]] = {}
        for seed in seeds:
            for arm, measures in cells_of_seed(laboratory, name, section, seed).items():
                gathered.setdefault(arm, []).append(measures)
            done += len(ARMS)
            typer.echo(f"study: {done} of {total} cells", err=True)
        cells[name] = {arm: stacked(each) for arm, each in gathered.items()}
    return cells


def cells_of_seed(laboratory: Laboratory, name: str, section: ConceptParams, seed: int) -> dict[str, Measured]:
    """The base, real drawings, and every arm."""
    from stages._study import ARMS, anchors, measured, pictures_of, task_of, total_steps

    told = dict(anchors(laboratory, name, section, pictures_of(laboratory, section, seed), seed))
    total = total_steps(section.train)
    for arm in ARMS:
        label = f"{name}, {arm.name}, seed {seed}: steps"
        with bar(total, label) if sys.stderr.isatty() else lines(total, label) as advance:
            told[arm.name] = measured(laboratory, task_of(laboratory, name, section, seed, arm), section, advance)
    return told


def stacked(cells: list[Measured]) -> Cells:
    """The seeds' cells as one array a measure."""
    import numpy as np

    return {name: np.array([cell[name] for cell in cells]) for name in cells[0]}


def text_of(
    rows: list[Row], names: list[str], seeds: int, params: Params, laboratory: Laboratory, *, as_json: bool,
) -> str:  # fmt: skip
    """The study in JSON, or in Markdown under a line that says what was measured."""
    from lora_pipeline.adapters.fingerprint import base_fingerprint
    from stages._study import MODEL, prompts_for, total_steps
    from stages._study_table import markdown

    fingerprint, numbers = base_fingerprint(laboratory.base), [params.seed + index for index in range(seeds)]
    pictures, steps = len(prompts_for("", laboratory.pictures)), total_steps(params.concepts[MODEL].train)
    if as_json:
        about = {"base": fingerprint, "subjects": names, "seeds": numbers, "pictures": pictures, "steps": steps}
        return json.dumps({**about, "rows": rows}, indent=2)
    head = (
        f"{', '.join(names)}; seeds {', '.join(map(str, numbers))}; {pictures} pictures of the subject and {pictures} "
        f"of the class a cell; {steps} steps; base {fingerprint[:12]}."
    )
    return f"{head}\n\n{markdown(rows)}"
