"""The losses of a run, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lora_pipeline.training.loop import StepLoss

_SIZE, _MARGIN = (640, 360), 40
_COLOURS = ("#1f77b4", "#d62728")
_MEMORY = 0.9


def write_losses(losses: Sequence[StepLoss], path: Path, validation: Sequence[StepLoss] = ()) -> None:
    """Writes `step,phase,loss`, a row a step, and `validation_loss` at the steps of its looks, if any."""
    rows = [f"{each.step},{each.phase},{each.loss:.6g}" for each in losses]
    title = "step,phase,loss"
    if validation:
        found = {each.step: f"{each.loss:.6g}" for each in validation}
        title += ",validation_loss"
        rows = [f"{row},{found.get(each.step, '')}" for row, each in zip(rows, losses, strict=True)]
    path.write_text("\n".join([title, *rows, ""]), encoding="utf-8")


def draw_losses(losses: Sequence[StepLoss], path: Path, validation: Sequence[StepLoss] = ()) -> None:
    """Draws each phase's loss over its steps, faint, and a running mean of it, from 0 upwards; validation in black."""
    picture = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(picture)
    (width, height), top = _SIZE, max(each.loss for each in (*losses, *validation)) or 1.0
    pen.rectangle((_MARGIN, _MARGIN, width - _MARGIN, height - _MARGIN), outline="#888888")
    pen.text((4, _MARGIN - 4), f"{top:.3g}", fill="black")
    pen.text((4, height - _MARGIN - 8), "0", fill="black")
    pen.text((width - _MARGIN - 60, height - _MARGIN + 6), f"{len(losses)} steps", fill="black")
    for place, phase in enumerate(dict.fromkeys(each.phase for each in losses)):
        colour = _COLOURS[place % len(_COLOURS)]
        mine = [each for each in losses if each.phase == phase]
        pen.text((_MARGIN + 100 * place, 12), phase, fill=colour)
        faint = Image.blend(Image.new("RGB", (1, 1), colour), Image.new("RGB", (1, 1), "white"), 0.7).getpixel((0, 0))
        for values, shade in (([each.loss for each in mine], faint), (_smoothed(mine), colour)):
            points = [_point(each.step / len(losses), value / top) for each, value in zip(mine, values, strict=True)]
            pen.line(points, fill=shade, width=1 if shade == faint else 2)
    _draw_validation(pen, [_point(each.step / len(losses), each.loss / top) for each in validation])
    picture.save(path, format="PNG")


def _draw_validation(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]]) -> None:
    if not points:
        return
    pen.text((_SIZE[0] - _MARGIN - 100, 12), "validation", fill="black")
    pen.line(points, fill="black", width=2)
    for across, down in points:
        pen.ellipse((across - 3, down - 3, across + 3, down + 3), fill="black")


def _smoothed(losses: Sequence[StepLoss]) -> list[float]:
    means, total, weight = [], 0.0, 0.0
    for each in losses:
        total, weight = _MEMORY * total + each.loss, _MEMORY * weight + 1.0
        means.append(total / weight)
    return means


def _point(across: float, up: float) -> tuple[float, float]:
    width, height = (side - 2 * _MARGIN for side in _SIZE)
    return _MARGIN + across * width, _MARGIN + (1.0 - up) * height
