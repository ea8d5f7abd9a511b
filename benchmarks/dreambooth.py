"""The peer: a training loop on diffusers and PEFT that does step for step what diffusers' DreamBooth-LoRA example does.

As its examples/dreambooth/train_dreambooth_lora.py with default settings: every step opens its pictures, encodes them
and the prompt, and reads the loss back; PEFT's adapters on the four projections of each attention; AdamW and clipping
through accelerate. With `cached`, prompts are encoded before the start, as its `--pre_compute_text_embeddings` does,
and so are the pictures' latent distributions, as `--cache_latents` of the advanced script does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator  # type: ignore[import-untyped]
from peft import LoraConfig
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from benchmarks.bases import PROMPT, on_gpu
from lora_pipeline.pretrained.components import Components

LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]


class Pictures(Dataset[dict[str, Tensor]]):
    """Pictures and their prompt, read and tokenised at every visit.

    Args:
        folder: With png files.
        pixels: The side to scale and crop to.
        tokenizer: Of the base.
    """

    def __init__(self, folder: Path, pixels: int, tokenizer: Any) -> None:
        self.paths = sorted(folder.glob("*.png"))
        self.pixels = pixels
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture = ImageOps.exif_transpose(Image.open(self.paths[index]))
        picture = ImageOps.fit(picture.convert("RGB"), (self.pixels, self.pixels), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()
        length = self.tokenizer.model_max_length
        told = self.tokenizer(PROMPT, truncation=True, padding="max_length", max_length=length, return_tensors="pt")
        return {"pixels": pixels.float().div(255).sub(0.5).div(0.5), "ids": told.input_ids[0]}


def run(
    base: Components, folder: Path, pixels: int, batch: int, rank: int, *, cached: bool, after_step: Callable[[], None]
) -> None:
    """Trains until `after_step`, which is called after every step, raises."""
    cuda = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if cuda else "no", cpu=not cuda)
    if cuda:
        on_gpu(base, torch.bfloat16)
    base.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LAYERS))
    learning: list[Any] = [parameter for parameter in base.unet.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    loader: Any = DataLoader(Pictures(folder, pixels, base.tokenizer), batch, shuffle=True)
    unet, optimiser, loader, rate = accelerator.prepare(base.unet, optimiser, loader, rate)
    kept = [_encoded(base, item) for item in loader] if cached else None
    bar = tqdm(desc="Steps", disable=True)
    while True:
        unet.train()
        for encoded in kept or (_encoded(base, item) for item in loader):
            loss = _loss(base, unet, *encoded)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(learning, 1.0)
            optimiser.step()
            rate.step()
            optimiser.zero_grad()
            bar.update(1)
            bar.set_postfix(loss=loss.detach().item(), lr=rate.get_last_lr()[0])
            after_step()


def _encoded(base: Components, item: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """The latents' distribution, and what the prompt says."""
    distribution = base.vae.encode(item["pixels"].to(base.vae.dtype)).latent_dist
    return distribution, base.text_encoder(item["ids"])[0]


def _loss(base: Components, unet: Any, distribution: Any, states: Tensor) -> Tensor:
    latents = distribution.sample() * base.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, base.scheduler.config.num_train_timesteps, latents.shape[:1], device=latents.device)
    said = unet(base.scheduler.add_noise(latents, noise, timesteps), timesteps, states, return_dict=False)[0]
    velocity = base.scheduler.config.prediction_type == "v_prediction"
    target = base.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return F.mse_loss(said.float(), target.float(), reduction="mean")
