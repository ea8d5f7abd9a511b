"""diffusers as the reader of what we write in kohya's format.

It takes one alpha for all of a UNet's attention layers, so alphas are uniform here; and it finds a text encoder's
attention only by an out_proj, so there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import kohya, save
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import target_of
from lora_pipeline.adapters.topology import FAMILIES, layers
from lora_pipeline.injection.inject import inject_adapter, set_weights

Load = Callable[..., Any]
Make = Callable[..., Adapter]
ALPHA = 2.0


def readable(adapter: Adapter) -> Adapter:
    """What diffusers can read of an adapter."""
    source = torch.Generator().manual_seed(4)
    down, up = torch.randn(2, 16, generator=source), torch.randn(16, 2, generator=source)
    factors = {name: replace(each, alpha=ALPHA) for name, each in adapter.factors.items()}
    factors["text_encoder.text_model.encoder.layers.0.self_attn.out_proj"] = LoraFactors(down, up, ALPHA)
    return replace(adapter, factors=factors)


def predictions(pipeline: Any) -> tuple[Tensor, Tensor]:
    padding = {"padding": "max_length", "max_length": 24, "truncation": True, "return_tensors": "pt"}
    ids = pipeline.tokenizer("a creature", **padding).input_ids
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        encoded = pipeline.text_encoder(ids).last_hidden_state
        return encoded, pipeline.unet(latents, 500, encoded).sample


def test_diffusers_loads_our_file_and_says_the_same(tmp_path: Path, pipeline: Load, make_adapter: Make) -> None:
    adapter = readable(make_adapter(1))
    save(adapter, tmp_path / "x.safetensors", "kohya")
    theirs, ours = pipeline(), pipeline()
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    again = load_adapter(tmp_path / "x.safetensors")
    for prefix in ("unet", "text_encoder"):
        inject_adapter(getattr(ours, prefix), prefix, again, "a")
        set_weights(getattr(ours, prefix), {"a": 1.0})
    for mine, other, plain in zip(predictions(ours), predictions(theirs), predictions(pipeline()), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mine, plain, rtol=1e-2)


def numbered(name: str) -> Adapter:
    """A family's layers, each with factors that nothing else has."""
    factors = {}
    for number, (target, shape) in enumerate(layers(name).items(), start=1):
        tail = [1] * (len(shape) - 2)
        down = torch.zeros(1).expand(1, *shape[1:]) + number
        factors[target] = LoraFactors(down, torch.zeros(shape[0], 1, *tail) - number, ALPHA)
    return Adapter(factors)


def targets_in_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its old keys, by target and side."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft

    unet = {name: tensor for name, tensor in state.items() if name.startswith("unet.")}
    text = {name: tensor for name, tensor in state.items() if not name.startswith("unet.")}
    converted = convert_unet_state_dict_to_peft(unet) | convert_state_dict_to_diffusers(text)
    found = {}
    for name, tensor in converted.items():
        model, _, path = name.partition(".")
        path, side = split(path)
        found[f"{target_of(model, path)}:{side}"] = tensor
    return found


def split(path: str) -> tuple[str, str]:
    for ending, side in (
        (".lora_A.weight", "down"),
        (".lora_B.weight", "up"),
        (".lora_linear_layer.down.weight", "down"),
        (".lora_linear_layer.up.weight", "up"),
        (".lora.down.weight", "down"),
        (".lora.up.weight", "up"),
    ):
        if path.endswith(ending):
            return path.removesuffix(ending), side
    raise AssertionError(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_finds_every_layer_by_our_name_for_it(name: str) -> None:
    """All layers of SD 1.x, SD 2.x, and of SDXL in SGM's names."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    adapter = numbered(name)
    tensors, _ = kohya.render(adapter)
    state = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), SimpleNamespace(layers_per_block=2))
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(state)
    assert set(alphas.values()) == {ALPHA}
    theirs = targets_in_diffusers(converted)
    expected = {f"{target}:down": each.down for target, each in adapter.factors.items()}
    expected |= {f"{target}:up": each.up for target, each in adapter.factors.items()}
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in expected.items())
