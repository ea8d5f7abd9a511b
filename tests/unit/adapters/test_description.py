"""What headers say, for each format, without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.description import describe
from lora_pipeline.adapters.formats import WRITERS, save
from lora_pipeline.adapters.storage import write_tensors

# They hold the layers of some bases, or no layers, and have tests of their own.
PARTIAL = {"cloneofsimo", "learned_embeds", "emb_params", "a1111"}


@pytest.mark.parametrize("form", sorted(WRITERS.keys() - PARTIAL))
def test_an_adapter_is_described_from_its_header(
    tmp_path: Path, make_adapter: Callable[..., Adapter], form: str
) -> None:
    adapter = make_adapter(1, tokens=("<a>",), base="b")
    save(adapter, tmp_path / "x", form)
    description = describe(tmp_path / "x")
    assert description.format == form
    assert description.layers == {"text_encoder": 1, "unet": 2}
    assert sum(rank * count for rank, count in description.ranks.items()) == sum(
        factors.rank for factors in adapter.factors.values()
    )
    assert description.tokens == {"<a>": 2}
    alphas = 3 if form == "kohya" else 0  # tensors there, and metadata elsewhere
    assert description.dtypes == {"F32": 7 + alphas}
    numbers = sum(each.down.numel() + each.up.numel() for each in adapter.factors.values())
    assert description.parameters == numbers + 16 + alphas
    assert description.size == (tmp_path / "x").stat().st_size
    assert description.provenance == {"base": "b"}


@pytest.mark.parametrize(
    "metadata", [{}, {"lora_pipeline": "{"}, {"lora_pipeline": "[]"}, {"lora_pipeline": '{"provenance": 1}'}]
)
def test_other_files_are_described_too(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_tensors(tmp_path / "x", {"conv_in.weight": torch.ones(2, 3), "scalar": torch.tensor(1.0)}, metadata)
    description = describe(tmp_path / "x")
    assert description.format == "unknown"
    assert description.parameters == 7
    assert description.provenance == {}


def test_describing_needs_no_torch() -> None:
    code = "import sys, stages.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
