"""The embedded base from seeds: draw pictures, fit the autoencoder, encode, fit the denoiser, save a folder.

Every step leaves its result in the work folder, and the two fits keep checkpoints there, so a run that was stopped goes
on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_pipeline.pretrained import blank
from lora_pipeline.toyworld import scene
from lora_pipeline.toyworld.autoencoder import to_tensor, train_autoencoder
from lora_pipeline.toyworld.denoiser import Denoiser, Latents, train_denoiser
from lora_pipeline.toyworld.fitting import Recipe, Report, load_weights
from lora_pipeline.toyworld.pictures import pictures

# Words that are one token each. Anything else, a placeholder's name too, is spelt in bytes.
WORDS = (
    *("a", "an", "drawing", "picture", "of", "on", "in", "the", "at", "background", "beach", "snow", "meadow", "night"),
    *("small", "large", "medium", "striped", "dotted", "plain", *scene.COLOURS, "pink", *scene.SHAPES),
    *(*scene.CREATURES, "creature", *scene.STYLES, scene.HELD_OUT_STYLE, "left", "right", "above", "below"),
    *("photo", "style", "shape"),
)


@dataclass(frozen=True)
class BaseRecipe:
    """How many pictures of which stream each part learns from, and for how long.

    The denoiser is trained in legs: each starts from the averaged weights of the one before, with its own cosine.
    """

    world: int
    composites: int
    autoencoder_world: int
    autoencoder_composites: int
    autoencoder: Recipe
    denoiser: tuple[Recipe, ...]
    shards: int
    seed: int = 0


RECIPE = BaseRecipe(
    world=100_000,
    composites=20_000,
    autoencoder_world=30_000,
    autoencoder_composites=20_000,
    autoencoder=Recipe(steps=6_500, batch=8, peak=2.5e-3),
    denoiser=(
        Recipe(steps=4_200, batch=48, peak=3e-3, hold=0.25),
        Recipe(steps=3_000, batch=48, peak=2e-3, seed=1),
    ),
    shards=4,
)


ENCODED_AT_ONCE = 20
Log = Callable[[str], Report]  # a reporter for the named part


def drawn(stream: str, count: int, work: Path, workers: int) -> tuple[np.ndarray, list[str]]:
    """The first `count` pictures of `stream`, uint8 (count, 64, 64, 3), and their captions; drawn once, then mapped."""
    pixels, words = work / f"{stream}-{count}.npy", work / f"{stream}-{count}.json"
    if not words.exists():
        partial = pixels.with_suffix(".partial")
        canvas = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, scene.SIDE, scene.SIDE, 3))
        captions: list[str] = []
        for chunk in pictures(stream, count, workers=workers):
            for item in chunk:
                canvas[len(captions)] = item.pixels
                captions.append(item.caption)
        canvas.flush()
        partial.replace(pixels)
        words.write_text(json.dumps(captions), encoding="utf-8")
    return np.load(pixels, mmap_mode="r"), json.loads(words.read_text(encoding="utf-8"))


@torch.no_grad()
def encoded(vae: blank.AutoencoderKL, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Posterior means and deviations of all pictures, float16 (n, 4, 16, 16)."""
    means, deviations = [], []
    for start in range(0, len(pixels), ENCODED_AT_ONCE):
        posterior = vae.encode(to_tensor(pixels[start : start + ENCODED_AT_ONCE])).latent_dist
        means.append(posterior.mean.half().contiguous())
        deviations.append(posterior.std.half().contiguous())
    return torch.cat(means), torch.cat(deviations)


def cached_latents(work: Path, recipe: BaseRecipe, vae: blank.AutoencoderKL, tokenise: blank.Tokenise) -> Latents:
    """The encoded world with its tokenised captions, made once and kept in `work`."""
    path = work / f"latents-{recipe.world}.safetensors"
    if not path.exists():
        pixels, captions = drawn("world", recipe.world, work, workers=os.cpu_count() or 1)
        mean, deviation = encoded(vae.to(memory_format=torch.channels_last), pixels)
        tensors = {"mean": mean, "deviation": deviation, "tokens": tokenise(captions), "empty": tokenise([""])[0]}
        save_file(tensors, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return Latents(**load_file(path))


def trained_autoencoder(work: Path, recipe: BaseRecipe, report: Report) -> blank.AutoencoderKL:
    """The autoencoder in eval mode, trained once and kept in `work`."""
    vae = blank.blank_autoencoder(recipe.seed)
    done = work / "autoencoder.safetensors"
    if not done.exists():
        workers = os.cpu_count() or 1
        world = drawn("world", recipe.world, work, workers)[0][: recipe.autoencoder_world]
        composites = drawn("composites", recipe.composites, work, workers)[0][: recipe.autoencoder_composites]
        pixels = np.concatenate([world, composites])
        train_autoencoder(vae, pixels, recipe.autoencoder, work / "autoencoder.checkpoint", report)
        save_file(vae.state_dict(), done.with_suffix(".partial"))
        done.with_suffix(".partial").replace(done)
    vae.load_state_dict(load_file(done))
    return vae.eval()


def train_base(work: Path, out: Path, recipe: BaseRecipe, log: Log) -> None:
    """Train everything and write a `StableDiffusionPipeline` folder of float16 safetensors to `out`.

    Args:
        work: Where pictures, latents and checkpoints are kept between tries (about 4 GB).
        out: The folder to write.
        recipe: Sizes and steps.
        log: Gives a reporter (step, loss) for the part of that name.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = blank.blank_tokenizer(WORDS, work / "tokenizer")
    vae = trained_autoencoder(work, recipe, log("autoencoder"))
    latents = cached_latents(work, recipe, vae, lambda captions: blank.tokenised(tokenizer, captions))
    text_encoder = blank.blank_text_encoder(len(tokenizer), recipe.seed)
    unet = blank.blank_unet(recipe.seed)
    model = Denoiser(text_encoder, unet)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing from torch's overloads
    scheduler = blank.blank_scheduler()
    for leg, part in enumerate(recipe.denoiser, start=1):
        checkpoint, report = work / f"denoiser-{leg}.checkpoint", log(f"denoiser, leg {leg}")
        average = train_denoiser(model, latents, scheduler.alphas_cumprod, part, checkpoint, report, recipe.shards)
        load_weights(model, average.weights)
    blank.save_base(blank.Parts(tokenizer, text_encoder, vae, unet, scheduler), out)
