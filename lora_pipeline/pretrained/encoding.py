"""Words and pictures to what the UNet reads, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lora_pipeline.errors import ParamsError
from lora_pipeline.injection.tokens import expand
from lora_pipeline.pretrained.components import Components


def tokenize(components: Components, prompts: Sequence[str]) -> Tensor:
    """Token ids, int64 (n, tokens), padded to the base's prompt length.

    Raises:
        ParamsError: A prompt has more tokens than the base reads.
    """
    tokenizer = components.tokenizer
    expanded = [expand(tokenizer, prompt) for prompt in prompts]
    length = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(expanded).input_ids, strict=True):
        if len(ids) > length:
            problem = f"has {len(ids) - 2} tokens, and the base reads {length - 2}"
            raise ParamsError(f"the prompt {prompt!r}", problem, "shorten it")
    return torch.tensor(tokenizer(expanded, padding="max_length", max_length=length).input_ids)


def encode_prompts(components: Components, prompts: Sequence[str]) -> Tensor:
    """The text encoder's last hidden states, (n, tokens, width), as Stable Diffusion 1.x and 2.x condition on."""
    ids = tokenize(components, prompts).to(components.text_encoder.device)
    states: Tensor = components.text_encoder(ids).last_hidden_state
    return states


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of `images` (n, 3, height, width) in [-1, 1], in the UNet's scale."""
    posterior = vae.encode(images.to(vae.device)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return ((posterior.mean - shift) * scale).cpu(), (posterior.std * scale).cpu()


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures (n, 3, height, width) in [-1, 1] of latents in the UNet's scale."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    images: Tensor = vae.decode(latents / scale + shift).sample
    return images.clamp(-1, 1)
