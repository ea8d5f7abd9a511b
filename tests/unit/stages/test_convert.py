"""The command that converts: what comes out, what is told, and what is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_pipeline.adapters import load_adapter, save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.description import describe
from lora_pipeline.adapters.fingerprint import base_fingerprint
from lora_pipeline.adapters.formats import WRITERS
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.storage import write_tensors

TARGET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CommandLine = Callable[..., int]


def adapter(*, tokens: bool = True, dora: bool = False, base: str | None = None) -> Adapter:
    source = torch.Generator().manual_seed(0)
    factors = LoraFactors(torch.randn(4, 8, generator=source), torch.randn(6, 4, generator=source), 3.0)
    return Adapter(
        {TARGET: factors},
        {"<zorp>": torch.randn(2, 768, generator=source)} if tokens else {},
        {"base": base} if base else {},
        magnitudes={TARGET: torch.rand(6, 1, generator=source)} if dora else {},
    )


def base(folder: Path) -> Path:
    source = torch.Generator().manual_seed(1)
    weight = {f"{TARGET.removeprefix('unet.')}.weight": torch.randn(6, 8, generator=source)}
    write_tensors(folder / "unet/diffusion_pytorch_model.safetensors", weight, {})
    write_tensors(folder / "text_encoder/model.safetensors", {}, {})
    return folder


@pytest.mark.parametrize("form", sorted(WRITERS.keys() - {"cloneofsimo", "learned_embeds", "emb_params", "a1111"}))
def test_every_written_format_of_any_layer_comes_back_as_it_was(
    form: str, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(adapter(tokens=False), Path("in"))
    assert command_line("convert", "in", "there", "--to", form) == 0
    assert capsys.readouterr().out == f"in (native) → there ({form}): 1 layer, no tokens\n"
    assert describe(Path("there")).format == form
    assert command_line("convert", "there", "back", "--to", "native") == 0
    factors = load_adapter(Path("back")).factors[TARGET]
    torch.testing.assert_close(factors.delta(), adapter().factors[TARGET].delta())


def test_a_pickle_is_read_only_on_request(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"<zorp>": torch.ones(2, 768)}, "in.bin")
    assert command_line("convert", "in.bin", "out", "--to", "native") == 5
    assert "--allow-pickle" in capsys.readouterr().err
    assert command_line("convert", "in.bin", "out", "--to", "native", "--allow-pickle") == 0
    assert capsys.readouterr().out == "in.bin (pickle) → out (native): 0 layers, tokens <zorp>\n"
    assert torch.equal(load_adapter(Path("out")).embeddings["<zorp>"], torch.ones(2, 768))


def test_a_cut_is_told_with_what_it_costs(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(adapter(), Path("in"))
    assert command_line("convert", "in", "out", "--to", "native", "--rank", "2", "--dtype", "float16") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("1 layer, tokens <zorp>")
    delta = adapter().factors[TARGET].delta()
    values = torch.linalg.svdvals(delta)
    lost = float(values[2:].norm() / values.norm())
    assert second.startswith(f"what is left out: {lost:.3%} of the whole change")
    made = load_adapter(Path("out"))
    assert made.factors[TARGET].rank == 2
    assert made.factors[TARGET].up.dtype == made.embeddings["<zorp>"].dtype == torch.float16
    assert float((made.factors[TARGET].delta() - delta).norm() / delta.norm()) == pytest.approx(lost, rel=1e-3)


def test_a_dora_becomes_plain_with_its_base(tmp_path: Path, command_line: CommandLine) -> None:
    folder = base(tmp_path / "base")
    dora = adapter(dora=True, base=base_fingerprint(folder))
    save_adapter(dora, Path("in"))
    assert command_line("convert", "in", "out", "--to", "diffusers", "--base", "base") == 0
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    changed = weight + dora.factors[TARGET].delta()
    expected = dora.magnitudes[TARGET] * changed / changed.norm(dim=1, keepdim=True) - weight
    torch.testing.assert_close(load_adapter(Path("out")).factors[TARGET].delta(), expected)


@pytest.mark.parametrize("form", ["native", "peft"])
def test_a_folder_of_something_else_is_never_replaced(
    form: str, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(adapter(tokens=False), Path("in"))
    Path("pictures").mkdir()
    Path("pictures/cat.png").write_bytes(b"cat")
    assert command_line("convert", "in", "pictures", "--to", form) == 2
    assert (
        capsys.readouterr().err == "error: pictures: is a folder that holds something else\nfix: write to pictures/in\n"
    )
    assert Path("pictures/cat.png").read_bytes() == b"cat"
    assert command_line("compose", "in", "--out", "pictures") == 2
    assert Path("pictures/cat.png").read_bytes() == b"cat"


def test_a_folder_of_an_older_conversion_is_replaced(command_line: CommandLine) -> None:
    save_adapter(adapter(tokens=False), Path("in"))
    for _ in range(2):
        assert command_line("convert", "in", "folder", "--to", "peft") == 0
    assert load_adapter(Path("folder")).factors.keys() == {TARGET}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["in", "out", "--to", "ckpt5"], 2, "--to: 'ckpt5'"),
        (["in", "in", "--to", "native"], 2, "in: is what is read"),
        (["none", "out", "--to", "native"], 4, "none"),
        (["in", "out", "--to", "native", "--rank", "0"], 2, "--rank: 0"),
        (["in", "out", "--to", "native", "--rank", "2", "--error", "0.1"], 2, "several"),
        (["in", "out", "--to", "native", "--rank", "2"], 5, "in: is a DoRA"),
        (["in", "out", "--to", "native", "--dtype", "int8"], 2, "--dtype: 'int8'"),
        (["in", "out", "--to", "native", "--base", "base"], 5, "was made for base"),
        (["large", "out", "--to", "native", "--dtype", "float16"], 5, "range of float16"),
    ],
)
def test_what_cannot_be_is_refused_and_the_old_file_kept(
    arguments: list[str],
    code: int,
    said: str,
    command_line: CommandLine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base(tmp_path / "base")
    save_adapter(adapter(dora=True, base="another"), Path("in"))
    save_adapter(Adapter({TARGET: LoraFactors(torch.full((1, 8), 1e6), torch.ones(6, 1), 1.0)}), Path("large"))
    Path("out").write_bytes(b"old")
    before = Path("in").read_bytes()
    assert command_line("convert", *arguments) == code
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""
    assert "\nfix: " in told.err
    assert Path("out").read_bytes() == b"old"
    assert Path("in").read_bytes() == before
