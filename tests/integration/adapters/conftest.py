"""A tiny random Stable Diffusion, small enough to build anew for every test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.injection.inject import collect, inject_new, remove, select_targets, trainable


def _vocabulary() -> dict[str, int]:
    letters = [*"abcdefghijklmnopqrstuvwxyz<>_0123456789"]
    vocabulary = {name: index for index, name in enumerate(letters + [f"{letter}</w>" for letter in letters])}
    vocabulary |= {name: len(vocabulary) + index for index, name in enumerate(["<|startoftext|>", "<|endoftext|>"])}
    return vocabulary


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny") / "base"
    vocabulary = _vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        config = CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
        text_encoder = CLIPTextModel(config)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(base: Path) -> Callable[[Path], object]:
    from diffusers import StableDiffusionPipeline

    def load(folder: Path = base) -> object:
        loaded = StableDiffusionPipeline.from_pretrained(folder)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return load


@pytest.fixture
def make_adapter(pipeline: Callable[..., object]) -> Callable[..., Adapter]:
    """Trained on nothing: random factors of mixed ranks and alphas in both models, linear and convolution."""
    globs = {
        "unet": [["*attn*.to_q", "*ff.net.0.proj"], ["*.conv1", "*attn*.to_out.0"], ["*proj_in", "conv_out"]],
        "text_encoder": [["*.q_proj"], ["*.mlp.fc1"]],
    }

    def make(seed: int, tokens: dict[str, int] | None = None) -> Adapter:
        source = torch.Generator().manual_seed(seed)
        loaded = pipeline()
        factors: dict[str, LoraFactors] = {}
        for prefix, groups in globs.items():
            model = getattr(loaded, prefix)
            for index, group in enumerate(groups):
                targets, name = select_targets(model, prefix, group), str(index)
                inject_new(model, prefix, targets, name, rank=index + 1, alpha=2.0 + index, generator=source)
                for parameter in trainable(model).values():
                    parameter.data = 0.2 * torch.randn(parameter.shape, generator=source)
                factors |= collect(model, prefix, name)
            remove(model)
        embeddings = {token: torch.randn(count, 16, generator=source) for token, count in (tokens or {}).items()}
        return Adapter(factors, embeddings, json.loads('{"note": "random"}'))

    return make
