"""What a merge holds in memory, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_pipeline.adapters.storage import write_tensors


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, suffix: str) -> None:
    start = "model.diffusion_model.input_blocks"
    shape = (1024, 1024)
    tensors = {f"{start}.{index}.1.proj_in.weight": torch.zeros(shape) for index in range(1, 41)}
    write_tensors(tmp_path / "base.safetensors", tensors, {})
    code = f"""
import resource, torch
from pathlib import Path
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.merging import merge
folder = Path({str(tmp_path)!r})
factors = {{f"unet.down_blocks.0.attentions.{{i}}.proj_in": LoraFactors(torch.ones(1, 1024), torch.ones(1024, 1), 1.0)
    for i in range(0, 40, 2)}}
torch.ones(9, 9) @ torch.ones(9, 9)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(folder / "base.safetensors", [("a", Adapter(factors), 1.0)], folder / "out.{suffix}", None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80  # MiB, of a model of 160 in tensors of 4
