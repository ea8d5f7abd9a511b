"""What each method of training is worth, on the embedded base: `python -m benchmarks.methods`; with `--json` as JSON.

The cells are those of `lora-pipe study`: every method learns two mascots from three seeds in the same number of steps,
and the embedded judge scores held-out prompts. They are kept in .work/study, so that a stopped run goes on; a whole one
takes some eighty minutes of one core. Intervals are in docs/study.md, which the same cells make.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks.rows import Row, show

MEANS = Mapping[str, Mapping[str, float]]
ROOT = Path(__file__).parents[1]


class Comparison(NamedTuple):
    """One figure of one method against another's.

    Args:
        measure: Of the study's table.
        method, peer: Its arms.
        less: Whether less of it is better.
        target: What the ratio should reach.
    """

    measure: str
    method: str
    peer: str
    less: bool
    target: float | None


COMPARISONS = (
    Comparison("drift", "dreambooth", "lora", True, 1.0),
    Comparison("diversity", "dreambooth", "lora", False, 1.0),
    Comparison("leak", "dreambooth", "lora", True, None),
    Comparison("similarity", "dreambooth", "lora", False, None),
    Comparison("drift", "dreambooth by prediction", "dreambooth", True, None),
    Comparison("similarity", "dreambooth by prediction", "dreambooth", False, None),
    *(
        Comparison(measure, method, peer, False, 1.15)
        for measure in ("similarity", "gap_closed")
        for method in ("pti", "joint")
        for peer in ("ti", "dreambooth")
    ),
)


def rows_of(means: MEANS) -> list[Row]:
    """The comparisons.

    Args:
        means: Measures by arm, over subjects and seeds.
    """
    rows = []
    for measure, method, peer, less, target in COMPARISONS:
        ours, theirs = means[method][measure], means[peer][measure]
        ratio = theirs / ours if less else ours / theirs
        met = None if target is None else ratio >= target
        rows.append(Row(f"{measure.replace('_', ' ')}, {method} against {peer}", ours, theirs, ratio, target, met))
    return rows


def means_of(document: Mapping[str, Sequence[Mapping[str, object]]]) -> dict[str, dict[str, float]]:
    """Of the study's JSON, by arm, over all subjects."""
    return {
        str(row["arm"]): {name: value["mean"] for name, value in row.items() if isinstance(value, dict)}
        for row in document["rows"]
        if row["subject"] == "all"
    }


def studied() -> MEANS:
    """Runs the study, with a process for every core but one."""
    import json

    jobs = max(1, (os.cpu_count() or 2) - 1)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "study.json"
        command = [sys.executable, "-c", "from stages.app import main; main()", "study", "--json"]
        subprocess.run(
            [*command, "--jobs", str(jobs), "--out", str(out)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        return means_of(json.loads(out.read_text("utf-8")))


if __name__ == "__main__":
    show(rows_of(studied()), sys.argv)
