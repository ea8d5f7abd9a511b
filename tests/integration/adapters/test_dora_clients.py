"""A DoRA made plain, against PEFT's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.checkpoints.slots import Place
from lora_pipeline.adapters.dora import plain
from lora_pipeline.adapters.header import read_header
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.storage import write_tensors
from lora_pipeline.adapters.weights import Weights

TARGET = "unet.mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [(nn.Linear(7, 5), (3, 7)), (nn.Linear(4, 9, bias=False), (3, 4)), (nn.Conv2d(4, 6, 3), (2, 4, 5, 5))],
)
def test_the_plain_adapter_does_what_pefts_layer_does(
    tmp_path: Path, layer: nn.Module, inputs: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer), config)
    parts = {name.rpartition("0.")[2]: parameter.data for name, parameter in model.named_parameters()}
    down, up = parts["lora_A.default.weight"], parts["lora_B.default.weight"]
    norms = parts["lora_magnitude_vector.default.weight"]
    norms *= 1 + 0.3 * torch.rand_like(norms)
    weight = parts["base_layer.weight"]
    rows = norms.reshape(-1, *[1] * (weight.ndim - 1))
    adapter = Adapter({TARGET: LoraFactors(down, up, 3.0)}, magnitudes={TARGET: rows})
    path = tmp_path / "base"
    write_tensors(path, {f"{TARGET}.weight": weight}, {})
    base = Weights({name: Place(path, entry) for name, entry in read_header(path).tensors.items()})
    made, cuts = plain(adapter, base, None)
    assert not made.magnitudes
    assert cuts[TARGET].residual == 0.0
    x = torch.randn(inputs)
    with torch.no_grad():
        expected = model(x)
        bias = parts.get("base_layer.bias")
        changed = weight + made.factors[TARGET].delta()
        got = nn.functional.linear(x, changed, bias) if weight.ndim == 2 else nn.functional.conv2d(x, changed, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
