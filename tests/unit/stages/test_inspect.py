"""The command that shows what a file is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_pipeline.adapters import save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.storage import write_tensors

CommandLine = Callable[..., int]
TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(autouse=True)
def _folder(command_line: CommandLine) -> None:  # noqa: ARG001 - it changes into the folder
    factors = {TO_K: LoraFactors(torch.ones(2, 1024), torch.ones(6, 2), 3.0)}
    save_adapter(Adapter(factors, {"<zorp>": torch.ones(2, 4)}, {"base": "b"}), Path("x.safetensors"))


def test_lines_tell_what_it_is(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("inspect", "x.safetensors") == 0
    told = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in told.splitlines() if " " in line)
    assert lines["format"] == "native"
    assert lines["family"] == "SD2"
    assert lines["unet"] == "cross-attention 1"
    assert lines["ranks"] == "2 (1 layers)"
    assert lines["alphas"] == "3 (1 layers)"
    assert lines["tokens"] == "<zorp> 2"
    assert lines["sha256"].endswith("x.safetensors")
    assert told.endswith('provenance\n{\n  "base": "b"\n}\n')


def test_json_is_what_a_program_reads(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("inspect", "x.safetensors", "--json", "--deep") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["targets"] == {"unet": {"cross-attention": 1}}
    norm = 1.5 * 2 * (6 * 1024) ** 0.5
    assert document["deep"]["norm"] == pytest.approx(norm)
    assert document["deep"]["layers"][TO_K] == {"alpha": 3.0, "needed": 1, "norm": pytest.approx(norm), "rank": 2}


def test_deep_lines_tell_what_a_cut_keeps(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("inspect", "x.safetensors", "--deep") == 0
    told = capsys.readouterr().out
    assert "norm of the whole change: 235.2\n  cut to rank 1: keeps 100.00% of it" in told
    assert told.splitlines()[-1].split() == ["235.2", "2", "1", "3", TO_K]


def test_a_base_has_no_ranks_to_tell(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    write_tensors(Path("x"), {"model.diffusion_model.out.2.weight": torch.ones(4)}, {})
    assert command_line("inspect", "x") == 0
    told = capsys.readouterr().out
    assert told.startswith("format      checkpoint\nfamily      not told by its widths\ndtypes      F32 1\n")


def test_a_file_does_not_command_the_terminal(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[2J\x9b31m\n"
    metadata = {"ss_output_name": hostile, "lora_pipeline": json.dumps({"provenance": {hostile: hostile}})}
    write_tensors(Path("x"), {"lora_unet_a.lora_down.weight": torch.ones(1, 1)}, metadata)
    assert command_line("inspect", "x") == 0
    assert command_line("inspect", "x", "--json") == 0
    assert not {"\x1b", "\x9b"} & set(capsys.readouterr().out)
    write_tensors(Path("x"), {hostile: torch.tensor(torch.nan)}, {})
    assert command_line("convert", "x", "out") == 5
    told = capsys.readouterr().err
    assert told.startswith("error: x: \\x1b[2J\\x9b31m\\n: holds NaN")
    assert told.count("\n") == 2


def test_metadata_nested_without_end_are_refused(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    for depth in (300, 600, 900, 5000):
        nested = '{"provenance": {"a": ' + "[" * depth + "]" * depth + "}}"
        write_tensors(Path("x"), {f"{TO_K}.down": torch.ones(1, 1)}, {"lora_pipeline": nested})
        for words in ((), ("--json",)):
            assert command_line("inspect", "x", *words) in (0, 5)
            assert "bug" not in capsys.readouterr().err
