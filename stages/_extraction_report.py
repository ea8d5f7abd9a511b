"""What an extraction kept of each layer, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageDraw

    from lora_pipeline.adapters.extraction import Extraction

_WIDTH, _PANEL, _LEFT, _TOP = 960, 150, 70, 46
_COLOURS = {"energy kept": "#4c78a8", "relative error": "#d62728", "rank": "#54a24b"}


def write_report(extraction: Extraction, data: Path, picture: Path) -> None:
    """Writes the numbers of every layer, and draws them.

    Args:
        extraction: What was extracted.
        data: The JSON file.
        picture: The PNG file.
    """
    data.write_text(json.dumps(document(extraction), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    draw(extraction, picture)


def document(extraction: Extraction) -> dict[str, object]:
    """Rank, norm, error and energy kept, overall and by layer, and the norms of what was left out."""
    layers = {
        target: {
            "energy": _short(cut.energy), "error": _short(cut.residual), "norm": _short(cut.norm), "rank": cut.rank,
        }
        for target, cut in extraction.layers.items()
    }  # fmt: skip
    return {
        "energy": _short(1.0 - extraction.residual**2),
        "error": _short(extraction.residual),
        "layers": layers,
        "left_out": {name: _short(norm) for name, norm in extraction.left_out.items()},
        "left_out_share": _short(extraction.left_out_share),
    }


def draw(extraction: Extraction, path: Path) -> None:
    """Draws a bar for each layer, in the order of their names: the energy kept, the relative error and the rank."""
    from PIL import Image, ImageDraw

    cuts = [extraction.layers[target] for target in sorted(extraction.layers)]
    panels = {
        "energy kept": ([cut.energy for cut in cuts], 1.0),
        "relative error": ([cut.residual for cut in cuts], 1.0),
        "rank": ([float(cut.rank) for cut in cuts], float(max((cut.rank for cut in cuts), default=1))),
    }
    picture = Image.new("RGB", (_WIDTH, _TOP + len(panels) * (_PANEL + 30)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((10, 8), _title(extraction), fill="black")
    for place, (name, (values, top)) in enumerate(panels.items()):
        _panel(pen, _TOP + place * (_PANEL + 30), name, values, top)
    picture.save(path, format="PNG")


def _title(extraction: Extraction) -> str:
    title = f"{len(extraction.layers)} layers, relative error {extraction.residual:.3g} overall"
    if extraction.layers:
        worst = max(sorted(extraction.layers), key=lambda target: extraction.layers[target].residual)
        title += f", at most {extraction.layers[worst].residual:.3g} in {worst}"
    return title


def _panel(pen: ImageDraw.ImageDraw, above: int, name: str, values: list[float], top: float) -> None:
    right, bottom = _WIDTH - 20, above + _PANEL
    pen.text((_LEFT, above - 14), name, fill=_COLOURS[name])
    pen.text((8, above), f"{top:g}", fill="black")
    pen.text((8, bottom - 10), "0", fill="black")
    edges = [_LEFT + (right - _LEFT) * place // max(1, len(values)) for place in range(len(values) + 1)]
    for value, start, end in zip(values, edges, edges[1:], strict=False):
        height = _PANEL * min(1.0, max(0.0, value / top))
        pen.rectangle((start, bottom - height, max(start, end - 1), bottom), fill=_COLOURS[name])
    pen.line((_LEFT, bottom, right, bottom), fill="black")


def _short(value: float) -> float:
    return float(f"{value:.6g}")
