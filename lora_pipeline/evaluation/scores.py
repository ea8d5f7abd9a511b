"""A render set held against the concepts it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_pipeline.evaluation.measures import Estimate, diversity, drift, estimate, likeness
from lora_pipeline.evaluation.scorer import Scorer

PROMPT, CLASS = "prompt", "class"


@dataclass(frozen=True)
class Rendered:
    """Pictures of one role: uint8 (n, height, width, 3), with their prompts, seeds and file names."""

    images: np.ndarray
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class References:
    """Pictures to compare with, each uint8 (n, height, width, 3) or None: the subject, the style, the class."""

    subject: np.ndarray | None
    style: np.ndarray | None
    priors: np.ndarray | None


@dataclass(frozen=True)
class Row:
    """The scores of one picture; None where there is nothing to compare with."""

    file: str
    role: str
    prompt: str
    seed: int
    subject: float | None
    style: float | None
    prompt_accuracy: float


@dataclass(frozen=True)
class Scores:
    """Everything measured: estimates over pictures, figures of sets, and a row a picture."""

    estimates: dict[str, Estimate]
    figures: dict[str, float]
    rows: tuple[Row, ...]


def rows_of(role: str, rendered: Rendered, references: References, scorer: Scorer) -> list[Row]:
    """The scores of each picture of a role."""
    if not len(rendered.images):
        return []
    accuracy = scorer.prompt_accuracy(rendered.images, rendered.prompts)
    subject: Sequence[float | None] = [None] * len(rendered.images)
    style: Sequence[float | None] = [None] * len(rendered.images)
    if references.subject is not None:
        subject = likeness(scorer.identity(rendered.images), scorer.identity(references.subject)).tolist()
    if references.style is not None:
        style = likeness(scorer.style(rendered.images), scorer.style(references.style)).tolist()
    columns = zip(rendered.files, rendered.prompts, rendered.seeds, subject, style, accuracy.tolist(), strict=True)
    return [Row(file, role, prompt, seed, a, b, c) for file, prompt, seed, a, b, c in columns]


def score(
    prompted: Rendered, classed: Rendered, references: References, scorer: Scorer, seed: int,
) -> Scores:  # fmt: skip
    """Score a set.

    Args:
        prompted: Pictures of the concept.
        classed: Pictures of its class, made with the same adapters; may be empty.
        references: What they are compared with.
        scorer: What reads the pictures.
        seed: Of the bootstrap.

    Returns:
        Estimates `subject`, `style`, `prompt_accuracy` over `prompted`; `leak` (likeness of class pictures to the
        subject), `style_leak` and `class_accuracy` over `classed`; figures `drift` and `diversity` of the class.
    """
    shown = rows_of(PROMPT, prompted, references, scorer)
    leaked = rows_of(CLASS, classed, references, scorer)
    told: dict[str, list[float | None]] = {
        "subject": [row.subject for row in shown],
        "style": [row.style for row in shown],
        "prompt_accuracy": [row.prompt_accuracy for row in shown],
        "leak": [row.subject for row in leaked],
        "style_leak": [row.style for row in leaked],
        "class_accuracy": [row.prompt_accuracy for row in leaked],
    }
    estimates = {}
    for number, (name, values) in enumerate(told.items()):
        known = [value for value in values if value is not None]
        if known:
            estimates[name] = estimate(np.array(known), np.random.default_rng([seed, number]))
    figures = {}
    if len(classed.images):
        vectors = scorer.identity(classed.images)
        figures["diversity"] = diversity(vectors)
        if references.priors is not None and len(references.priors):
            figures["drift"] = drift(vectors, scorer.identity(references.priors))
    return Scores(estimates, figures, (*shown, *leaked))
