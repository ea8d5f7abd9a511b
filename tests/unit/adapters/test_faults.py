"""Bad input on the command line: one error that names the file and the key, a remedy, its code, and nothing written."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters import load_adapter, save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import native
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.storage import write_tensors

CommandLine = Callable[..., int]
TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
COMMANDS = {
    "convert": ("convert", "bad.safetensors", "out", "--to", "native"),
    "compose": ("compose", "good.safetensors", "bad.safetensors=0.5", "--out", "out"),
    "merge": ("merge", "bad.safetensors", "--base", "base", "--out", "merged"),
}


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, **fields: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop], **fields}


class Harmful:
    """Unpickled, it leaves a canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def zipped(name: str, contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, contents)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
# contents, what the error says after the file's name, what the fix says
FILES: dict[str, tuple[bytes, str, str]] = {
    "an empty file": (b"", "is empty", "get the file again"),
    "wrong magic": (b"GGUF" + bytes(60), "no safetensors file", "get the file again"),
    "a cut in the header": (packed({"a": entry(0, 8)}, bytes(8))[:30], "is truncated", "get the file again"),
    "a cut in the data": (packed({"a": entry(0, 8)}, bytes(4)), "is truncated", "get the file again"),
    "trailing bytes": (packed({"a": entry(0, 8)}, bytes(9)), "bytes after its last tensor", "get the file again"),
    "a header too long": (struct.pack("<Q", 2**40) + b"{}", "no safetensors file", "get the file again"),
    "a header cut short": (struct.pack("<Q", 5) + packed({"a": entry(0, 8)}, bytes(8))[8:], "header", "get the file"),
    "a hole": (packed({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "b: its data leaves a hole", "get the file"),
    "an overlap": (packed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "b: its data overlaps", "get the file"),
    "a negative offset": (packed({"a": entry(-4, 0)}, bytes(4)), "a: its shape", "get the file again"),
    "an overflow": (packed({"a": entry(0, 4, shape=[2**62, 4])}, bytes(4)), "a: its shape", "get the file again"),
    "a key twice": (
        packed(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32"}}'), "duplicate key 'a'",
        "get the file again",
    ),
    "NaN": (packed({"a": entry(0, 4)}, struct.pack("<f", float("nan"))), "a: holds NaN", "train again"),
    "infinity": (packed({"a": entry(0, 4)}, struct.pack("<f", float("-inf"))), "a: holds NaN or inf", "train again"),
    "no tensor": (packed({}), "no adapter of a known format (no tensor at all)", "native"),
    "a web page": (b"\n<!DOCTYPE html><html>Log in</html>", "is a web page", "download it again"),
    "a git-lfs pointer": (POINTER, "git-lfs pointer", "git lfs pull"),
    "a zip archive": (zipped("lora/zorp.safetensors", b"x" * 100), "is a zip archive", "unpack it"),
    "a pickle": (pickle.dumps(Harmful()), "is a pickle", "safetensors"),
    "torch's pickle": (zipped("archive/data.pkl", pickle.dumps(Harmful())), "is a pickle", "safetensors"),
    "an old pickle": (pickle.dumps(Harmful(), protocol=0), "no safetensors file", "get the file again"),
}  # fmt: skip


def adapter(**changes: object) -> Adapter:
    return Adapter({TO_K: LoraFactors(torch.ones(2, 768), torch.ones(6, 2), 1.0)}, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter, a base, and an old output that must stay as it is."""
    folder = tmp_path_factory.mktemp("files")
    save_adapter(adapter(), folder / "good.safetensors")
    tensors = {f"{TO_K.removeprefix('unet.')}.weight": torch.ones(6, 768)}
    write_tensors(folder / "base/unet/diffusion_pytorch_model.safetensors", tensors, {})
    write_tensors(folder / "base/text_encoder/model.safetensors", {}, {})
    (folder / "base/text_encoder/config.json").write_text("{}")
    (folder / "out").write_bytes(b"old")
    (folder / "merged").mkdir()
    (folder / "merged/model_index.json").write_bytes(b"old")
    return folder


@pytest.fixture(autouse=True)
def _folder(files: Path, tmp_path: Path, command_line: CommandLine) -> None:  # noqa: ARG001 - it changes into it
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)


def assert_refused(code: int, expected: int, told: str, where: str, said: str, fix: str) -> None:
    assert code == expected, told
    match = re.fullmatch(r"error: (.*)\nfix: (.*)\n", told)
    assert match, told
    assert match[1].startswith(where)
    assert said in match[1]
    assert fix in match[2]
    assert Path("out").read_bytes() == Path("merged/model_index.json").read_bytes() == b"old"
    assert not Path("canary").exists()
    assert not [path for path in Path().iterdir() if "partial" in path.name or "building" in path.name]


@pytest.mark.parametrize("command", [*COMMANDS.values(), ("inspect", "bad.safetensors")], ids=lambda words: words[0])
@pytest.mark.parametrize(("contents", "said", "fix"), FILES.values(), ids=FILES)
def test_a_bad_file_is_refused(
    command: tuple[str, ...],
    contents: bytes,
    said: str,
    fix: str,
    command_line: CommandLine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("bad.safetensors").write_bytes(contents)
    code = command_line(*command)
    if command[0] == "inspect" and said.startswith(("a: holds", "no adapter")):
        assert code == 0  # it reads no numbers, and tells of files that are no adapter, too
        return
    assert_refused(code, 5, capsys.readouterr().err, "bad.safetensors: ", said, fix)


def document(**changes: object) -> dict[str, str]:
    return {"lora_pipeline": json.dumps({"alphas": {TO_K: 1.0}, "format": 1, "provenance": {}} | changes)}


UP, DOWN = {f"{TO_K}.up": torch.ones(6, 2)}, {f"{TO_K}.down": torch.ones(2, 768)}
LORA_A, LORA_B = f"{TO_K}.lora_A.weight", f"{TO_K}.lora_B.weight"
PAIR = {LORA_A: torch.ones(2, 768), LORA_B: torch.ones(6, 2)}
KOHYA = "lora_unet_" + TO_K.removeprefix("unet.").replace(".", "_")
HALVES = {f"{KOHYA}.lora_down.weight": torch.ones(2, 768), f"{KOHYA}.lora_up.weight": torch.ones(6, 2)}
LOHA = {f"{KOHYA}.hada_w{side}": torch.ones(2, 2) for side in ("1_a", "1_b", "2_a", "2_b")}
# tensors, metadata, what the error says after the file's name
ADAPTERS: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "half a pair": (DOWN, document(), f"{TO_K}.up"),
    "the other half": (UP, document(), f"{TO_K}.down"),
    "ranks apart": (UP | {f"{TO_K}.down": torch.ones(3, 768)}, document(), TO_K),
    "half a pair of PEFT's": ({LORA_A: torch.ones(2, 768)}, {}, TO_K),
    "ranks apart of PEFT's": (PAIR | {LORA_B: torch.ones(6, 3)}, {}, "do not belong together"),
    "half a pair of kohya's": ({f"{KOHYA}.lora_up.weight": torch.ones(6, 2)}, {}, "lora_down.weight"),
    "ranks apart of kohya's": (HALVES | {f"{KOHYA}.lora_up.weight": torch.ones(6, 3)}, {}, "do not belong together"),
    "an alpha of kohya's": (HALVES | {f"{KOHYA}.alpha": torch.ones(2)}, {}, "its alpha [1.0, 1.0]"),
    "half a LoHa": ({name: LOHA[name] for name in sorted(LOHA)[:3]}, {}, "hada_w2_b"),
    "ranks apart of a LoHa": (LOHA | {f"{KOHYA}.hada_w2_b": torch.ones(3, 2)}, {}, "ranks 2 and 3"),
    "two kinds at once": (HALVES | LOHA, {}, "a LoRA and a LoHa at once"),
    "whole numbers": (UP | {f"{TO_K}.down": torch.ones(2, 768, dtype=torch.int8)}, document(), "whole numbers (int8)"),
    "a token of whole numbers": ({"embedding.<a>": torch.ones(1, 4, dtype=torch.int32)}, document(alphas={}), "<a>"),
    "a wrong prefix": ({"vae.a.lora_A.weight": torch.ones(2, 4), "vae.a.lora_B.weight": torch.ones(4, 2)}, {}, "vae.a"),
    "an alpha that is no number": (UP | DOWN, document(alphas={TO_K: None}), TO_K),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(("tensors", "metadata", "said"), ADAPTERS.values(), ids=ADAPTERS)
def test_a_bad_adapter_is_refused(
    command: tuple[str, ...],
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    said: str,
    command_line: CommandLine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tensors(Path("bad.safetensors"), tensors, metadata)
    code = command_line(*command)
    assert_refused(code, 5, capsys.readouterr().err, "bad.safetensors: ", said, "")


STRANGE = {
    "diffusers": PAIR | {"unet.strange": torch.ones(2), "unet.stranger": torch.ones(2)},
    "kohya": HALVES | {f"{KOHYA}.strange": torch.ones(2), "lora_unet_strange.lora_up.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("command", ["compose", "merge"])
@pytest.mark.parametrize("form", STRANGE)
def test_unknown_keys_are_named_where_they_would_be_lost(
    command: str, form: str, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(Path("bad.safetensors"), STRANGE[form], {})
    code = command_line(*COMMANDS[command])
    assert_refused(code, 5, capsys.readouterr().err, "bad", "strange", "")


def test_an_adapter_of_another_family_is_told_so(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(Adapter({TO_K: LoraFactors(torch.ones(2, 2048), torch.ones(6, 2), 1.0)}), Path("bad.safetensors"))
    code = command_line(*COMMANDS["merge"])
    said = "bad: is made for SDXL (width 2048), the base is SD1 (width 768)"
    assert_refused(code, 5, capsys.readouterr().err, "bad", said, "give a base of the family")


def test_an_adapter_of_layers_the_base_lacks_names_one(
    command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "unet.mid_block.attentions.0.proj_in"
    save_adapter(Adapter({other: LoraFactors(torch.ones(2, 8), torch.ones(6, 2), 1.0)}), Path("bad.safetensors"))
    assert_refused(command_line(*COMMANDS["merge"]), 5, capsys.readouterr().err, other, "no layer of this base", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_and_a_missing_file_are_told_apart(
    command: str, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(command_line(*COMMANDS[command]), 4, capsys.readouterr().err, "bad.safetensors", "no such file", "")
    Path("bad.safetensors").mkdir()
    assert_refused(command_line(*COMMANDS[command]), 5, capsys.readouterr().err, "bad.safetensors", "is a folder", "")


@pytest.mark.parametrize("command", [("compose", "--out", "out"), ("merge", "--base", "base", "--out", "merged")])
def test_no_adapter_at_all_is_a_usage_error(
    command: tuple[str, ...], command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(command_line(*command), 2, capsys.readouterr().err, command[0], "needs either", "--help")


@pytest.mark.parametrize(
    "rule",
    [("--rank", "0"), ("--rank", "-1"), ("--energy", "0"), ("--energy", "1.5"), ("--error", "1"), ("--error", "nan")],
)
def test_a_rank_out_of_range_is_a_usage_error(
    rule: tuple[str, str], command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command_line("convert", "good.safetensors", "out", "--to", "native", *rule)
    assert_refused(code, 2, capsys.readouterr().err, rule[0], "out of range", "use ")


def test_alpha_zero_is_no_change_and_no_alpha_is_the_rank(command_line: CommandLine) -> None:
    write_tensors(Path("zero"), UP | DOWN, document(alphas={TO_K: 0}))
    write_tensors(Path("kohya's zero"), HALVES | {f"{KOHYA}.alpha": torch.tensor(0)}, {})
    write_tensors(Path("absent"), PAIR, {})
    write_tensors(Path("kohya's absent"), HALVES, {})
    for name in ("zero", "kohya's zero", "absent", "kohya's absent"):
        Path("out").unlink()
        assert command_line("convert", name, "out", "--to", "native") == 0
        factors = load_adapter(Path("out")).factors[TO_K]
        assert factors.alpha == (0.0 if "zero" in name else 2.0)
        assert float(factors.delta().max()) == (0.0 if "zero" in name else 2.0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_computed_with_in_float32(dtype: torch.dtype, command_line: CommandLine) -> None:
    down, up = torch.rand(2, 768).to(dtype), torch.rand(6, 2).to(dtype)
    write_tensors(Path("small"), *native.render(Adapter({TO_K: LoraFactors(down, up, 3.0)})))
    Path("out").unlink()
    assert command_line("compose", "small=0.5", "good.safetensors", "--out", "out") == 0
    expected = 0.5 * 1.5 * up.float() @ down.float() + 0.5 * torch.ones(6, 2) @ torch.ones(2, 768)
    torch.testing.assert_close(load_adapter(Path("out")).factors[TO_K].delta(), expected)
