"""The parts of the embedded base, and what training them rests on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_pipeline.pretrained import blank
from lora_pipeline.pretrained.components import load_components
from lora_pipeline.pretrained.encoding import tokenize
from lora_pipeline.toyworld.autoencoder import psnr, to_tensor, whiten
from lora_pipeline.toyworld.base import WORDS
from lora_pipeline.toyworld.denoiser import CAPTION_DROPOUT, Latents, noised
from lora_pipeline.toyworld.fitting import step_generator
from lora_pipeline.toyworld.pictures import picture


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    tokenizer = blank.blank_tokenizer(WORDS, out / "words")
    parts = blank.Parts(
        tokenizer,
        blank.blank_text_encoder(len(tokenizer), 0),
        blank.blank_autoencoder(0),
        blank.blank_unet(0),
        blank.blank_scheduler(),
    )
    blank.save_base(parts, out / "base")
    return out / "base"


def test_a_saved_base_loads_and_fits_its_budget(base: Path) -> None:
    components = load_components(base)
    assert components.unet.config.sample_size == 16
    assert sum(file.stat().st_size for file in base.rglob("*") if file.is_file()) < 12_000_000


def test_every_word_of_the_world_is_one_token_and_any_text_has_some(base: Path) -> None:
    components = load_components(base)
    for word in WORDS:
        assert components.tokenizer.tokenize(word) == [f"{word}</w>"]
    assert len(tokenize(components.tokenizer, ["ein Zebra: 斑马!"])[0].unique()) > 4


def test_blank_parts_are_the_same_twice_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = blank.blank_unet(5), blank.blank_unet(5)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_whitening_gives_unit_latents_and_changes_no_reconstruction() -> None:
    vae = blank.blank_autoencoder(0).eval()
    images = to_tensor(np.stack([picture("world", index).pixels for index in range(48)]))
    before = psnr(vae, images)
    whiten(vae, images)
    with torch.no_grad():
        flat = vae.encode(images).latent_dist.mean.permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(4), atol=1e-3)
    covariance = flat @ flat.T / flat.shape[1]
    assert torch.allclose(covariance - torch.diag(covariance.diagonal()), torch.zeros(4, 4), atol=1e-2)
    assert float(covariance.diagonal().max()) < 1.01
    assert psnr(vae, images) == pytest.approx(before, abs=1e-3)


def test_the_velocity_leads_back_to_picture_and_noise() -> None:
    alphas = blank.blank_scheduler().alphas_cumprod
    mean = torch.randn(10, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    tokens = torch.arange(240).reshape(10, 24)
    latents = Latents(mean, torch.zeros_like(mean), tokens, torch.full((24,), -1))
    rows = torch.arange(10)
    batch = noised(latents, alphas, rows, step_generator(0, 0))
    signal = alphas[batch.timesteps].sqrt()[:, None, None, None]
    noise = (1 - alphas[batch.timesteps]).sqrt()[:, None, None, None]
    # x = sqrt(a) z - sqrt(1 - a) v, from the two equations that define z and v.
    assert torch.allclose(signal * batch.noisy - noise * batch.velocity, mean.float(), atol=1e-4)
    assert len(set((batch.timesteps // 100).tolist())) == 10  # one timestep in each tenth of the schedule


def test_captions_are_left_out_as_often_as_said() -> None:
    alphas = blank.blank_scheduler().alphas_cumprod
    mean = torch.zeros(1, 4, 16, 16).half()
    latents = Latents(mean, mean, torch.zeros(1, 24, dtype=torch.long), torch.ones(24, dtype=torch.long))
    batch = noised(latents, alphas, torch.zeros(4000, dtype=torch.long), step_generator(0, 1))
    assert float(batch.tokens[:, 0].float().mean()) == pytest.approx(CAPTION_DROPOUT, abs=0.02)
