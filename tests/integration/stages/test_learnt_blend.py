"""`compose` on a base, which learns the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_pipeline.adapters import load_adapter, save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import CorruptError
from lora_pipeline.pretrained.blank import blank_tokenizer, seeded
from stages.compose import compose

QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
OUT = Path("out.safetensors")
LEARN = {"base": Path("base"), "prompt": ["a=a creature", "b=a dog"], "method": "least_squares", "draws": 1}
pytestmark = pytest.mark.filterwarnings("default::FutureWarning")


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and two adapters in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PIPE_TRACKING", "off")
    tokenizer = blank_tokenizer(["a", "creature", "dog"], tmp_path / "words")
    size = len(tokenizer)
    with seeded(0):
        unet = UNet2DConditionModel(
            sample_size=4, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=size, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=24, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
            )
        )  # fmt: skip
    StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained("base")
    for seed, name in enumerate("ab"):
        source = torch.Generator().manual_seed(seed)
        factors = LoraFactors(torch.randn(2, 8, generator=source), torch.randn(8, 2, generator=source), 2.0)
        save_adapter(Adapter({QUERY: factors}, {}), Path(f"{name}.safetensors"))


def test_it_writes_the_sum_at_weights_that_it_tells(capfd: pytest.CaptureFixture[str]) -> None:
    compose(OUT, ["a.safetensors", "b.safetensors"], **LEARN)  # type: ignore[arg-type]
    made = load_adapter(OUT)
    weights = made.provenance["fit"]["weights"]  # type: ignore[index,call-overload]
    parts = {name: load_adapter(Path(f"{name}.safetensors")).factors[QUERY].delta() for name in "ab"}
    expected = sum((weights[name]["M00"] * delta for name, delta in parts.items()), torch.zeros(1))  # type: ignore[index,call-overload,operator]
    torch.testing.assert_close(made.factors[QUERY].delta(), expected)
    told = capfd.readouterr().out
    assert f"a: M00 {weights['a']['M00']:.3f}" in told  # type: ignore[index,call-overload]


def test_adapters_of_another_base_are_refused() -> None:
    adapter = load_adapter(Path("a.safetensors"))
    save_adapter(Adapter(adapter.factors, {}, {"base": "0" * 64}), Path("a.safetensors"))
    with pytest.raises(CorruptError, match="base"):
        compose(OUT, ["a.safetensors", "b.safetensors"], **LEARN)  # type: ignore[arg-type]
    assert not OUT.exists()
