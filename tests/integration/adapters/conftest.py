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
def sdxl(base: Path) -> Callable[[], object]:
    """A tiny pipeline of SDXL's topology: size and crop beside the time, two encoders, the second one projecting."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def load() -> object:
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        settings = json.loads((base / "text_encoder" / "config.json").read_text())
        settings = {name: settings[name] for name in ("vocab_size", "max_position_embeddings", "eos_token_id")}
        settings |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings |= {"bos_token_id": settings["eos_token_id"] - 1, "pad_token_id": settings["eos_token_id"]}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=4,
                cross_attention_dim=32,
                attention_head_dim=8,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 12,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            )
            first = CLIPTextModel(CLIPTextConfig(**settings))
            second = CLIPTextModelWithProjection(CLIPTextConfig(**settings, projection_dim=12, hidden_act="gelu"))
            vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
        models = {"unet": unet, "text_encoder": first, "text_encoder_2": second, "vae": vae}
        for model in models.values():
            model.eval()
        return StableDiffusionXLPipeline(
            **models,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            add_watermarker=False,
        )

    return load


ENCODER = [["*.q_proj"], ["*.mlp.fc1"]]
GLOBS = {
    "unet": [["*attn*.to_q", "*ff.net.0.proj"], ["*.conv1", "*attn*.to_out.0"], ["*proj_in", "conv_out"]],
    "text_encoder": ENCODER,
}
SDXL_GLOBS = {
    "unet": [*GLOBS["unet"], ["add_embedding.linear_1", "time_embedding.*"]],
    "text_encoder": ENCODER,
    "text_encoder_2": [["*.v_proj", "text_projection"], ["*.mlp.fc2"]],
}


def random_adapter(loaded: object, globs: dict[str, list[list[str]]], seed: int, tokens: dict[str, int]) -> Adapter:
    """Trained on nothing: random factors of mixed ranks and alphas in all models, linear and convolution."""
    source = torch.Generator().manual_seed(seed)
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
    embeddings = {token: torch.randn(count, 16, generator=source) for token, count in tokens.items()}
    return Adapter(factors, embeddings, json.loads('{"note": "random"}'))


@pytest.fixture
def make_adapter(pipeline: Callable[..., object]) -> Callable[..., Adapter]:
    def make(seed: int, tokens: dict[str, int] | None = None) -> Adapter:
        return random_adapter(pipeline(), GLOBS, seed, tokens or {})

    return make


@pytest.fixture
def make_sdxl_adapter(sdxl: Callable[[], object]) -> Callable[[int], Adapter]:
    return lambda seed: random_adapter(sdxl(), SDXL_GLOBS, seed, {})
