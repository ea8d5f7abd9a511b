"""Merging an adapter into a single file of Stable Diffusion 1.5's size against copying that file.

`python -m benchmarks.merging [--json]`. Both end with the bytes on the disk (fsync), each in a process of its own; the
weights are random float16, the adapter has rank 16 on the 176 linear layers of the attentions, the text encoder's too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.rows import Row, show
from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.checkpoints.single_file import slots_for
from lora_pipeline.adapters.checkpoints.slots import Place
from lora_pipeline.adapters.formats import save
from lora_pipeline.adapters.header import TensorEntry
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.merging import merge
from lora_pipeline.adapters.storage import stream_tensors
from lora_pipeline.adapters.weights import open_weights

RANK = 16
REPEATS = 3
LAYERS = re.compile(r".*(attn\d\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)\.weight")


def rows() -> list[Row]:
    """Time against the copy's, and peak memory against 1 GB."""
    with tempfile.TemporaryDirectory(prefix="merging-") as folder:
        base, adapter, out = (Path(folder) / name for name in ("base.safetensors", "adapter.safetensors", "out"))
        _write_base(base)
        _write_adapter(base, adapter)
        copies, merges = [], []
        for _ in range(REPEATS):
            copies.append(_measured("copy", base, adapter, out.with_suffix(".safetensors")))
            merges.append(_measured("merge", base, adapter, out.with_suffix(".safetensors")))
        ckpt = _measured("merge", base, adapter, out.with_suffix(".ckpt"))
        size = base.stat().st_size / 1e9
    copy = min(seconds for seconds, _ in copies)
    merged, memory = min(seconds for seconds, _ in merges), max(peak for _, peak in [*merges, ckpt])
    what = f"merge rank {RANK} into {size:.2f} GB float16"
    return [
        Row(f"{what}, .safetensors: s, against a copy's (at most)", merged, copy, merged / copy, 2, merged <= 2 * copy),
        Row(f"{what}, .ckpt: s, against a copy's (at most)", ckpt[0], copy, ckpt[0] / copy, 2, ckpt[0] <= 2 * copy),
        Row(f"{what}: peak resident GB, against 1 (at most)", memory, 1, memory, 1, memory <= 1),
    ]


def _write_base(path: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        text = CLIPTextModel(config)
    models = {"unet.": unet, "vae.": vae, "text_encoder.text_model.": text}
    places = {
        start + name.removeprefix("text_model."): Place(path, TensorEntry("F16", tuple(tensor.shape), 0, 0))
        for start, model in models.items()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    slots = slots_for(places)
    source = torch.Generator().manual_seed(0)
    layout = {key: (slot.dtype, slot.shape) for key, slot in slots.items()}
    stream_tensors(path, layout, {}, lambda key: [(0.03 * torch.randn(slots[key].shape, generator=source)).half()])


def _write_adapter(base: Path, path: Path) -> None:
    weights, source = open_weights(base), torch.Generator().manual_seed(1)
    factors = {}
    for name in filter(LAYERS.fullmatch, sorted(weights.places)):
        out, into = weights.shape(name)
        down, up = torch.randn(RANK, into, generator=source), 0.001 * torch.randn(out, RANK, generator=source)
        factors[name.removesuffix(".weight")] = LoraFactors(down, up, float(RANK))
    save(Adapter(factors), path, "native")


def _measured(work: str, base: Path, adapter: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak resident GB of a process that does only this."""
    os.sync()
    command = [sys.executable, "-m", "benchmarks.merging", work, str(base), str(adapter), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    out.unlink()
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def _work(work: str, base: Path, adapter: Path, out: Path) -> None:
    part = ("adapter", load_adapter(adapter), 0.8)
    start = time.perf_counter()
    if work == "merge":
        merge(base, [part], out, None)
    else:
        shutil.copyfile(base, out)
        with out.open("rb+") as file:
            os.fsync(file.fileno())
    taken = time.perf_counter() - start
    # not getrusage, whose peak begins with what the parent held when it forked
    status = Path("/proc/self/status").read_text("utf-8")
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
    sys.stdout.write(json.dumps([taken, peak * 1024 / 1e9]))


if __name__ == "__main__":
    if sys.argv[1:2] in (["copy"], ["merge"]):
        _work(sys.argv[1], *map(Path, sys.argv[2:]))
    else:
        show(rows(), sys.argv[1:])
