"""`lora-pipe evaluate`: a render set gets its scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_pipeline.errors import CorruptError, MissingError
from lora_pipeline.params import load_params
from stages._stage import PARAMS, entry, stage

if TYPE_CHECKING:
    import numpy as np

    from lora_pipeline.evaluation.scorer import Scorer
    from lora_pipeline.evaluation.scores import Rendered


def evaluate(
    render_set: Annotated[str, typer.Option("--set", help="A render set of params.yaml.")],
    renders: Annotated[Path, typer.Option(help="The folder `render` wrote.")],
    processed: Annotated[Path, typer.Option(help="The folder of all concepts' training pictures.")],
    priors: Annotated[Path, typer.Option(help="The folder of all concepts' class pictures.")],
    judge: Annotated[Path, typer.Option(help="What reads the pictures: the toy world's judge, or a CLIP folder.")],
    out: Annotated[Path, typer.Option(help="The JSON to write; a .csv and a .png appear beside it.")],
) -> None:
    """Score a render set: likeness to its concepts, obedience to its prompts, and what leaked into the class.

    Examples:

        lora-pipe evaluate --set zorp --renders renders/zorp --processed data/processed --priors data/priors \
--judge models/judge --out scores/zorp.json

        dvc repro evaluate@zorp

        dvc metrics show
    """
    from lora_pipeline.evaluation.report import draw_chart, metrics, write_metrics, write_rows
    from lora_pipeline.evaluation.scores import References, score

    params = load_params(PARAMS)
    asked = entry(params.renders, "renders", render_set).evaluate

    def settings() -> dict[str, object]:
        now = load_params(PARAMS)
        told = entry(now.renders, "renders", render_set).evaluate.model_dump(mode="json")
        return {"seed": now.seed, **told}

    outs = (out, out.with_suffix(".csv"), out.with_suffix(".png"))
    with stage("evaluate", render_set, out=outs, inputs=[renders, processed, priors, judge], section=settings) as run:
        prompted, classed = read_renders(renders)
        references = References(
            subject=read_pictures(processed / asked.subject) if asked.subject else None,
            style=read_pictures(processed / asked.style) if asked.style else None,
            priors=read_pictures(priors / asked.subject) if asked.subject else None,
        )
        scores = score(prompted, classed, references, load_scorer(judge), params.seed)
        write_metrics(scores, run.outs[0])
        write_rows(scores, run.outs[1])
        draw_chart(scores, render_set, run.outs[2])
        for name, value in metrics(scores).items():
            run.tracker.metric(name, value, 0)


def load_scorer(folder: Path) -> Scorer:
    """The toy world's judge, or a CLIP, by what the folder's config.json says."""
    config = folder / "config.json"
    if not config.is_file():
        raise MissingError(str(config), "there is no such file", "set `judge` to models/judge or to a CLIP folder")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CorruptError(str(config), "is not a JSON object", "copy the folder again") from error
    if kind == "clip":
        from lora_pipeline.pretrained.clip import ClipScorer

        return ClipScorer(folder)
    from lora_pipeline.toyworld.judge import load_judge
    from lora_pipeline.toyworld.scoring import JudgeScorer

    return JudgeScorer(load_judge(folder))


def read_pictures(folder: Path) -> np.ndarray | None:
    """All pictures of a dataset folder, uint8 (n, height, width, 3); None when it holds none."""
    import numpy as np

    from lora_pipeline.data.dataset import read_examples
    from lora_pipeline.data.images import open_picture

    examples = read_examples(folder)
    return np.stack([np.asarray(open_picture(example.image)) for example in examples]) if examples else None


def read_renders(folder: Path) -> tuple[Rendered, Rendered]:
    """The pictures of the concept's prompts and those of the class's."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise MissingError(str(path), "there is no such file", "run `lora-pipe render` first")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return rendered(folder, records, "prompt"), rendered(folder, records, "class")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(str(path), f"cannot be read ({error})", "run `lora-pipe render` again") from error


def rendered(folder: Path, records: list[dict[str, object]], role: str) -> Rendered:
    """The pictures of one role."""
    import numpy as np

    from lora_pipeline.data.images import open_picture
    from lora_pipeline.evaluation.scores import Rendered

    mine = [record for record in records if record["role"] == role]
    files = tuple(str(record["file_name"]) for record in mine)
    pictures = [np.asarray(open_picture(folder / "images" / Path(file).name)) for file in files]
    return Rendered(
        np.stack(pictures) if pictures else np.empty((0, 1, 1, 3), np.uint8),
        tuple(str(record["prompt"]) for record in mine),
        tuple(int(str(record["seed"])) for record in mine),
        files,
    )
