"""Denoising: from prompts and seeds to pictures, by the base's own scheduler.

Guidance: Ho & Salimans 2022, arXiv:2207.12598. The negative prompt stands where the empty one was.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from lora_pipeline.errors import ParamsError
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.denoising import Conditioning, Denoiser, joined
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.pretrained.latents import decode_latents, pixels_a_cell
from lora_pipeline.pretrained.threads import is_small
from lora_pipeline.rendering.weighting import Weighting, unweighted

States = Mapping[tuple[int, str], Conditioning]  # by text row and prompt
LATENT_CELLS = 4096  # of all pictures of a batch
_PAIR = ThreadPoolExecutor(2, "guidance", initializer=torch.set_num_threads, initargs=(1,))  # starts no thread yet


@dataclass(frozen=True)
class _Settings:
    steps: int
    guidance_scale: float
    guidance_rescale: float
    negative_prompt: str
    weighting: Weighting


@torch.inference_mode()
def sample(  # noqa: PLR0913 - everything that decides a picture
    components: Components,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    negative_prompt: str,
    weighting: Weighting | None,
    batch: int,
    guidance_rescale: float = 0.0,
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Draws a picture for each prompt and seed, at the base's own size.

    A picture depends on its prompt and seed, not on the pictures drawn beside it; only where `batch` differs may
    floating point round differently.

    Args:
        components: The base, with whatever is injected into it.
        prompts: One a picture.
        seeds: One a picture.
        steps: Denoising steps, from 1 to the steps the base was trained with.
        guidance_scale: At 1 and below there is no guidance, and the negative prompt has no effect.
        negative_prompt: What the pictures are guided away from; may be empty.
        weighting: Which weights adapters have in which step; None leaves them as they are. Prompts are encoded once
            for each of its rows of the text encoders.
        batch: How many pictures are drawn together.
        guidance_rescale: How far guided predictions are scaled back to the spread they have without guidance, from 0
            to 1 (Lin et al. 2023, arXiv:2305.08891, section 3.4; they use 0.7).
        advance: Is told how many pictures are done.

    Returns:
        uint8 (n, height, width, 3).

    Raises:
        ParamsError: The steps are out of range, a prompt is too long, or the pictures are not finite.
    """
    most = components.scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ParamsError("steps", f"is {steps}", f"use 1 to {most}")
    settings = _Settings(steps, guidance_scale, guidance_rescale, negative_prompt, weighting or unweighted(steps))
    states = _encoded(components, {negative_prompt, *prompts}, settings.weighting)
    pictures = [np.empty((0, *_size(components), 3), dtype=np.uint8)]
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        pictures.append(_draw(components, states, prompts[part], seeds[part], settings))
        if advance is not None:
            advance(start + len(prompts[part]))
    return np.concatenate(pictures)


def _encoded(components: Components, prompts: Collection[str], weighting: Weighting) -> States:
    """Prompts as each row of the text encoders reads them; one at a time, so that none depends on the others."""
    states: dict[tuple[int, str], Conditioning] = {}
    for row in sorted({text for step in weighting.steps for _, text in step}):
        weighting.use_text(row)
        states |= {(row, prompt): encode_prompts(components, [prompt]) for prompt in prompts}
    return states


def picture_generator(seed: int, purpose: str) -> Generator:
    """A CPU generator that depends on its two arguments and nothing else."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def pictures_at_once(components: Components) -> int:
    """How many pictures to draw together: 16 of 16 x 16 latents, one of 64 x 64, in about the same memory."""
    side: int = components.unet.config.sample_size
    return max(1, LATENT_CELLS // (side * side))


def initial_latents(components: Components, seeds: Sequence[int]) -> Tensor:
    """Unit Gaussian noise (n, channels, height, width), each picture's from its own seed."""
    shape = (components.vae.config.latent_channels, *_latent_size(components))
    return torch.stack([torch.randn(shape, generator=picture_generator(seed, "latents")) for seed in seeds])


def _draw(
    components: Components,
    states: States,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: _Settings,
) -> np.ndarray:
    scheduler = copy.deepcopy(components.scheduler)  # it counts its steps
    scheduler.set_timesteps(settings.steps)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = [picture_generator(seed, "steps") for seed in seeds]
    asked = _Asked(Denoiser(components), states, prompts, settings)
    latents = initial_latents(components, seeds) * scheduler.init_noise_sigma
    order = getattr(scheduler, "order", 1)
    for index, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, timestep)
        # Samplers of second order ask twice in a step; some take a step more than they were told.
        prediction = asked.prediction(min(index // order, settings.steps - 1), model_input, timestep)
        latents = scheduler.step(prediction.to(latents), timestep, latents, **options).prev_sample
    return _to_bytes(decode_latents(components.vae, latents).cpu())


class _Asked:
    """What the base says to the prompts of a batch, with the weights of a step."""

    def __init__(self, denoise: Denoiser, states: States, prompts: Sequence[str], settings: _Settings) -> None:
        self.denoise = denoise
        self.settings = settings
        rows = {row for row, _ in states}
        self.wanted = {row: joined([states[row, prompt] for prompt in prompts]) for row in rows}
        self.unwanted = {row: states[row, settings.negative_prompt][[0] * len(prompts)] for row in rows}

    def prediction(self, step: int, latents: Tensor, timestep: Tensor) -> Tensor:
        """The mean over the step's rows."""
        said = []
        for row, text_row in self.settings.weighting.steps[step]:
            self.settings.weighting.use(row)
            said.append(self._guided(latents, timestep, text_row))
        return said[0] if len(said) == 1 else torch.stack(said).mean(dim=0)

    def _guided(self, latents: Tensor, timestep: Tensor, text_row: int) -> Tensor:
        wanted, scale = self.wanted[text_row], self.settings.guidance_scale
        if scale <= 1:
            return self.denoise(latents, timestep, wanted)
        away, towards = _two_predictions(self.denoise, latents, timestep, self.unwanted[text_row], wanted)
        guided = away + scale * (towards - away)
        rescale = self.settings.guidance_rescale
        return rescaled(guided, towards, rescale) if rescale else guided


def rescaled(guided: Tensor, plain: Tensor, share: float) -> Tensor:
    """Guided predictions (n, ...) whose deviation, each picture's, has come a share of the way to that of the plain."""
    over = list(range(1, guided.ndim))
    ratio = plain.std(dim=over, keepdim=True) / guided.std(dim=over, keepdim=True)
    return guided * (share * ratio + (1.0 - share))


def _two_predictions(
    denoise: Denoiser, latents: Tensor, timestep: Tensor, unwanted: Conditioning, wanted: Conditioning
) -> tuple[Tensor, Tensor]:
    """The UNet's predictions under two conditions: together, or by a small UNet on two threads."""
    if not is_small(denoise.unet):
        away, towards = denoise(torch.cat([latents] * 2), timestep, joined([unwanted, wanted])).chunk(2)
        return away, towards

    @torch.inference_mode()  # a thread has a mode of its own
    def predict(conditioning: Conditioning) -> Tensor:
        return denoise(latents, timestep, conditioning)

    away, towards = _PAIR.map(predict, (unwanted, wanted))
    return away, towards


def _to_bytes(images: Tensor) -> np.ndarray:
    if not bool(images.isfinite().all()):
        raise ParamsError("weights", "made the pictures overflow", "lower the weights or the guidance scale")
    return ((images + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _latent_size(components: Components) -> tuple[int, int]:
    size = components.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _size(components: Components) -> tuple[int, int]:
    height, width = _latent_size(components)
    scale = pixels_a_cell(components.vae)
    return height * scale, width * scale
