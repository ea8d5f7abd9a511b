"""A set of pictures: every prompt with every seed, each with its recipe, and a sheet of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_pipeline.adapters.adapter import Json
from lora_pipeline.pretrained.components import Components
from lora_pipeline.rendering.records import write_picture
from lora_pipeline.rendering.sampling import pictures_at_once, sample
from lora_pipeline.rendering.sheet import contact_sheet
from lora_pipeline.rendering.weighting import Weighting

PROMPT, CLASS = "prompt", "class"


@dataclass(frozen=True)
class PictureSet:
    """What to draw.

    Args:
        prompts: Of the concept.
        class_prompts: Of its class; they show what leaked into it.
        seeds: Each prompt is drawn from each.
        steps: Denoising steps.
        guidance_scale: At 1 and below there is no guidance.
        negative_prompt: What the pictures are guided away from; may be empty.
        guidance_rescale: See `sample`.
    """

    prompts: Sequence[str]
    class_prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int
    guidance_scale: float
    negative_prompt: str
    guidance_rescale: float = 0.0

    @property
    def rows(self) -> tuple[tuple[str, str], ...]:
        """Role and prompt of each row of the sheet."""
        return (*((PROMPT, prompt) for prompt in self.prompts), *((CLASS, prompt) for prompt in self.class_prompts))


def write_set(
    components: Components,
    pictures: PictureSet,
    weighting: Weighting | None,
    origin: Mapping[str, Json],
    out: Path,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Writes images/0000.png, ..., metadata.jsonl (file_name, prompt, seed, role) and sheet.png, row by row.

    Args:
        components: The base, with its adapters attached.
        pictures: What to draw.
        weighting: The adapters' weights.
        origin: What the recipe in every picture says besides: base, adapters, weights.
        out: A folder; made.
        advance: Is told how many pictures are drawn.

    Raises:
        ParamsError: See `sample`.
    """
    cells = [(role, prompt, seed) for role, prompt in pictures.rows for seed in pictures.seeds]
    settings: dict[str, Json] = {
        "steps": pictures.steps,
        "guidance_scale": pictures.guidance_scale,
        "guidance_rescale": pictures.guidance_rescale,
        "negative_prompt": pictures.negative_prompt,
    }
    images = sample(
        components,
        [prompt for _, prompt, _ in cells],
        [seed for _, _, seed in cells],
        steps=pictures.steps,
        guidance_scale=pictures.guidance_scale,
        guidance_rescale=pictures.guidance_rescale,
        negative_prompt=pictures.negative_prompt,
        weighting=weighting,
        batch=pictures_at_once(components),
        advance=advance,
    )
    (out / "images").mkdir(parents=True)
    lines = []
    for index, ((role, prompt, seed), image) in enumerate(zip(cells, images, strict=True)):
        name = f"images/{index:04}.png"
        made_from: dict[str, Json] = {"prompt": prompt, "role": role, "seed": seed}
        write_picture(out / name, image, {**origin, **settings, **made_from})
        lines.append(json.dumps({"file_name": name, **made_from}, ensure_ascii=False, sort_keys=True) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    labels = [prompt for _, prompt in pictures.rows]
    contact_sheet(images, labels, [f"seed {seed}" for seed in pictures.seeds]).save(out / "sheet.png", format="PNG")
