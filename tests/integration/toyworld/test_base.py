"""The whole recipe of the embedded base, in miniature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_pipeline.toyworld.base import BaseRecipe, train_base
from lora_pipeline.toyworld.fitting import Recipe, Report

RECIPE = BaseRecipe(
    world=24,
    composites=8,
    autoencoder_world=8,
    autoencoder_composites=8,
    autoencoder=Recipe(steps=2, batch=4, peak=1e-3),
    denoiser=(Recipe(steps=3, batch=4, peak=1e-3), Recipe(steps=3, batch=4, peak=1e-3, seed=1)),
    shards=2,
)


def quiet(part: str) -> Report:  # noqa: ARG001 - the interface of logs
    return lambda step, loss: None  # noqa: ARG005


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_stopped_recipe_goes_on_to_the_same_base_and_diffusers_runs_it(tmp_path: Path) -> None:
    def stopping(part: str) -> Report:
        def report(step: int, loss: float) -> None:  # noqa: ARG001
            if part == "denoiser, leg 2" and step == 2:
                raise KeyboardInterrupt

        return report

    train_base(tmp_path / "whole", tmp_path / "base", RECIPE, quiet)
    with pytest.raises(KeyboardInterrupt):
        train_base(tmp_path / "stopped", tmp_path / "resumed", RECIPE, stopping)
    assert not (tmp_path / "resumed").exists()
    train_base(tmp_path / "stopped", tmp_path / "resumed", RECIPE, quiet)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "base")

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a red star", num_inference_steps=2, output_type="pt", height=64, width=64).images
    assert pictures.shape == (1, 3, 64, 64)
    assert torch.isfinite(pictures).all()
