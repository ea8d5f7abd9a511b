"""Untrained parts of a tiny Stable Diffusion, and the folder they are saved to.

Sizes are those of the embedded base: 64 x 64 pictures, 4 x 16 x 16 latents, prompts of at most 24 tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS = 4
TEXT_WIDTH = 128
TOKENS = 24
Tokenise = Callable[[list[str]], Tensor]
START, END = "<|startoftext|>", "<|endoftext|>"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, module constructors draw from `seed`; outside, torch's global generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def blank_autoencoder(seed: int) -> AutoencoderKL:
    """0.65 M parameters. Two groups a norm: with more, groups of few channels wipe out flat colour."""
    with seeded(seed):
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
            sample_size=64,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    with torch.no_grad():  # a posterior of unit width drowns the first steps in noise
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -6.0
    return vae


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE (Radford et al. 2019) uses for bytes, in CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = range(256, 256 + 256 - len(kept))
    return [chr(code) for code in (*kept, *moved)]


def spell(word: str, merges: Sequence[tuple[str, str]]) -> list[str]:
    """`word` as byte-pair encoding spells it with `merges`, the earliest applying first."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    for first, second in merges:
        at = 0
        while at < len(pieces) - 1:
            if (pieces[at], pieces[at + 1]) == (first, second):
                pieces[at : at + 2] = [first + second]
            at += 1
    return pieces


def blank_tokenizer(words: Sequence[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token and any other text is spelt in bytes.

    Writes its files into `folder`.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = spell(word, merges)
        while len(pieces) > 1:  # new merges rank last, so the words before keep their spelling
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    symbols = byte_symbols()
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(first + second for first, second in merges)]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate([*dict.fromkeys(vocabulary), START, END])}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges), ""]), encoding="utf-8"
    )
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS, unk_token=END, pad_token=END
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def blank_text_encoder(vocabulary: int, seed: int) -> CLIPTextModel:
    """Two layers of width 128.

    Token rows start at unit scale: at CLIP's 0.02 the words of so small an encoder come out nearly alike (mean cosine
    0.93) and a denoiser takes long to tell shapes apart.
    """
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    with seeded(seed):
        encoder = CLIPTextModel(config)
        with torch.no_grad():
            for weight in encoder.get_input_embeddings().parameters():
                nn.init.normal_(weight, std=0.5)
    return encoder


def blank_unet(seed: int) -> UNet2DConditionModel:
    """2.5 M parameters: 48 channels at 16 x 16, 96 with cross-attention at 8 x 8.

    The pooled prompt joins the time embedding (`addition_embed_type="text"`) and scales every ResNet block, so that
    what the whole picture shows need not pass through cross-attention.
    """
    with seeded(seed):
        return UNet2DConditionModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(48, 96),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=4,
            attention_head_dim=(2, 3),
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            resnet_time_scale_shift="scale_shift",
        )


def blank_scheduler() -> DDIMScheduler:
    """v-prediction on Stable Diffusion's betas, rescaled to end in pure noise (Lin et al. 2023, algorithm 1)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


@dataclass(frozen=True)
class Parts:
    """Everything a `StableDiffusionPipeline` folder holds, the tokenizer's files apart."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler


def tokenised(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """int64 (n, 24), padded and cut."""
    ids = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    return torch.tensor(ids)


def save_base(parts: Parts, out: Path) -> None:
    """Write `parts` as a `StableDiffusionPipeline` folder of float16 safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    # A tokenizer remembers how it was last called, and would write that down.
    parts.tokenizer.backend_tokenizer.no_truncation()
    parts.tokenizer.backend_tokenizer.no_padding()
    parts.tokenizer.save_pretrained(out / "tokenizer")
    for name, model in (("text_encoder", parts.text_encoder), ("vae", parts.vae), ("unet", parts.unet)):
        halved: Any = copy.deepcopy(model)
        halved.to(dtype=torch.float16, memory_format=torch.contiguous_format)
        halved.save_pretrained(out / name, safe_serialization=True)
    parts.scheduler.save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(parts.scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
