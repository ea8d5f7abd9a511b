"""Scores as files: flat JSON for `dvc metrics`, a CSV row a picture for `dvc plots`, and a chart to look at."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lora_pipeline.evaluation.scores import Row, Scores

DIGITS = 6
BAR, LEFT, WIDTH, TOP = 34, 170, 640, 34


def metrics(scores: Scores) -> dict[str, float]:
    """Flat names to numbers, rounded to six digits: `subject`, `subject_low`, `subject_high`, `subject_n`, ..."""
    told: dict[str, float] = dict(scores.figures)
    for name, value in scores.estimates.items():
        told |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high, f"{name}_n": value.n}
    return {name: round(told[name], DIGITS) for name in sorted(told)}


def write_metrics(scores: Scores, path: Path) -> None:
    """Writes the numbers as JSON."""
    path.write_text(json.dumps(metrics(scores), indent=2) + "\n", encoding="utf-8")


def write_rows(scores: Scores, path: Path) -> None:
    """Writes a row a picture."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in scores.rows:
            told = asdict(row)
            writer.writerow({k: round(v, DIGITS) if isinstance(v, float) else v for k, v in told.items()})


def draw_chart(scores: Scores, title: str, path: Path) -> None:
    """A bar for each estimate, with its interval as a line, on an axis from 0 to 1."""
    height = TOP + BAR * len(scores.estimates) + 20
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    pen.text((10, 8), title, fill="black", font=font)

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 80) * min(1.0, max(0.0, value))

    for place, (name, value) in enumerate(scores.estimates.items()):
        y = TOP + BAR * place
        pen.text((10, y + 6), name.replace("_", " "), fill="black", font=font)
        pen.rectangle((LEFT, y + 4, across(value.mean), y + BAR - 8), fill="#4c78a8")
        pen.line((across(value.low), y + BAR / 2 - 2, across(value.high), y + BAR / 2 - 2), fill="black", width=2)
        pen.text((across(1.0) + 8, y + 6), f"{value.mean:.2f}", fill="black", font=font)
    pen.line((LEFT, TOP, LEFT, height - 20), fill="black")
    picture.save(path, format="PNG")
