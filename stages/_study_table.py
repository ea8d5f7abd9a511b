"""A study's cells as a table: means with bootstrap intervals over seeds and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_pipeline.evaluation.measures import LEVEL, RESAMPLES

BASE, REAL = "base", "real"
ALL = "all"  # the mean over the subjects
# Key, heading, and how a number is written.
COLUMNS = (
    ("similarity", "subject similarity", "{:.3f}"),
    ("gap_closed", "gap closed", "{:.2f}"),
    ("accuracy", "prompt accuracy", "{:.3f}"),
    ("points", "its difference, points", "{:+.1f}"),
    ("leak", "class leak", "{:.3f}"),
    ("rise", "its rise", "{:+.3f}"),
    ("drift", "class drift", "{:.3f}"),
    ("diversity", "class diversity", "{:.3f}"),
)
DIGITS = 6

# Measure to a value for each picture, uniform in shape over seeds: (seeds, pictures).
Cells = Mapping[str, np.ndarray]
# Measure to its mean, followed by the means of the resamples.
Draws = dict[str, np.ndarray]
Row = dict[str, object]


def draws(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean of `values` (seeds, pictures), then the means of resampled seeds' resampled pictures: (1 + resamples,).

    With one column, which is a figure of a whole set, only seeds are resampled.
    """
    seeds, pictures = values.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = rng.integers(pictures, size=(RESAMPLES, seeds, pictures))
    return np.concatenate([[values.mean()], values[rows, columns].mean(axis=(1, 2))])


def gap_closed(arm: np.ndarray, base: np.ndarray, real: np.ndarray) -> np.ndarray:
    """(arm - base) / (real - base): 0 at the base, 1 at real drawings."""
    closed: np.ndarray = (arm - base) / (real - base)
    return closed


def compared(arms: Mapping[str, Draws]) -> dict[str, Draws]:
    """Adds to each arm what it is beside the base and real drawings."""
    base, real = arms[BASE], arms[REAL]
    told = {name: dict(measures) for name, measures in arms.items()}
    for name, measures in told.items():
        if name in (BASE, REAL):
            continue
        measures["gap_closed"] = gap_closed(measures["similarity"], base["similarity"], real["similarity"])
        measures["points"] = 100 * (measures["accuracy"] - base["accuracy"])
        measures["rise"] = measures["leak"] - base["leak"]
    return told


def mean_of(subjects: Sequence[Mapping[str, Draws]]) -> dict[str, Draws]:
    """Arm by arm and measure by measure, the mean over subjects, which are fixed and not resampled."""
    return {
        arm: {name: np.mean([subject[arm][name] for subject in subjects], axis=0) for name in measures}
        for arm, measures in subjects[0].items()
    }


def rows_of(cells: Mapping[str, Mapping[str, Cells]], seed: int) -> list[Row]:
    """The table's rows.

    Args:
        cells: Subject to arm to measures; `base` and `real` are among the arms.
        seed: Of the bootstrap.
    """
    subjects = {}
    for number, (subject, arms) in enumerate(cells.items()):
        rng = np.random.default_rng([seed, number])
        drawn = {arm: {name: draws(values, rng) for name, values in told.items()} for arm, told in arms.items()}
        subjects[subject] = compared(drawn)
    if len(subjects) > 1:
        subjects[ALL] = mean_of(list(subjects.values()))
    return [
        {"subject": subject, "arm": arm, **{name: interval(values) for name, values in measures.items()}}
        for subject, arms in subjects.items()
        for arm, measures in arms.items()
    ]


def interval(values: np.ndarray) -> dict[str, float]:
    """The first of `values`, and the percentile interval of the others."""
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {name: round(float(x), DIGITS) for name, x in (("mean", values[0]), ("low", low), ("high", high))}


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table: mean [low, high]; a dash where a row has no such measure."""
    head = ["subject", "arm", *(heading for _, heading, _ in COLUMNS)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([str(row["subject"]), str(row["arm"]), *(written(row.get(k), form) for k, _, form in COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(value: object, form: str) -> str:
    if not isinstance(value, dict):
        return "–"
    mean, low, high = (form.format(value[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
