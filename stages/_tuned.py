"""What a training run leaves: what was learnt, its losses, and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json
    from lora_pipeline.params import ConceptParams
    from lora_pipeline.pretrained.components import Components
    from lora_pipeline.training.tuning import Tuned

SAMPLE_SEEDS = (0, 1, 2, 3)
_SAMPLES = "samples"


def write_tuned(
    tuned: Tuned, provenance: Mapping[str, Json], base: Path, components: Components, folder: Path
) -> Components:
    """Writes `tuned.safetensors`, or of method full `model/` and `provenance.json`, and the losses.

    Returns:
        The base with what was learnt, to draw with.
    """
    from lora_pipeline.adapters import save_adapter
    from lora_pipeline.adapters.checkpoints.tuned import write_tuned as write_model
    from lora_pipeline.pretrained.adapted import add_adapter
    from lora_pipeline.pretrained.components import load_components
    from lora_pipeline.training.curve import draw_losses, write_losses

    write_losses(tuned.losses, folder / "loss.csv", tuned.validation)
    draw_losses(tuned.losses, folder / "loss.png", tuned.validation)
    if tuned.weights:
        write_model(base, tuned.weights, folder / "model")
        (folder / "provenance.json").write_text(json.dumps(provenance, sort_keys=True) + "\n", "utf-8")
        return load_components(folder / "model")
    adapter = tuned.adapter(provenance)
    save_adapter(adapter, folder / "tuned.safetensors")
    add_adapter(components, adapter, "tuned")
    return components


def sample_path(work: Path, step: int) -> Path:
    """Where the pictures of a step wait for the run's end; a killed run finds them again."""
    (work / _SAMPLES).mkdir(exist_ok=True)
    return work / _SAMPLES / f"{step:06}.png"


def keep_samples(work: Path, folder: Path) -> None:
    """Takes the pictures drawn on the way, if there are any, into the folder."""
    if (work / _SAMPLES).is_dir():
        shutil.copytree(work / _SAMPLES, folder / _SAMPLES)


def draw_samples(components: Components, section: ConceptParams, path: Path) -> None:
    """Renders the concept's sample prompt from a few seeds, with the settings its class pictures have."""
    from lora_pipeline.rendering.sampling import sample
    from lora_pipeline.rendering.sheet import contact_sheet

    prompts = [section.train.samples.prompt] * len(SAMPLE_SEEDS)
    images = sample(
        components,
        prompts,
        SAMPLE_SEEDS,
        steps=section.priors.steps,
        guidance_scale=section.priors.guidance_scale,
        negative_prompt="",
        weighting=None,
        batch=len(SAMPLE_SEEDS),
    )
    sheet = contact_sheet(images, [section.train.samples.prompt], [f"seed {seed}" for seed in SAMPLE_SEEDS])
    sheet.save(path, format="PNG")
