"""Files: canonical bytes out, nothing damaged or unsafe in, safetensors itself as the client."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_pipeline.adapters.header import MAX_HEADER_BYTES, read_header
from lora_pipeline.adapters.storage import DTYPES, read_tensors, stream_tensors, write_tensors
from lora_pipeline.errors import CorruptError, MissingError, PipelineError, ResourceError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.arange(3, dtype=torch.float16),
    "ü": torch.arange(2, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
}
METADATA = {"z": "1", "a": "é"}
# the layout is specified in storage.py; a change of these bytes is a change of every hash in dvc.lock
GOLDEN = "94226a15548304137745c6cc5a06b7689b9a423b7004bed9b44ff6aac1aab85f"


def test_bytes_do_not_depend_on_order_and_never_change(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1", TENSORS, METADATA)
    write_tensors(tmp_path / "2", dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
    first = (tmp_path / "1").read_bytes()
    assert first == (tmp_path / "2").read_bytes()
    assert hashlib.sha256(first).hexdigest() == GOLDEN


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, METADATA)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
        assert set(file.keys()) == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_we_read_what_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    safetensors.torch.save_file({"x": tensor}, path, {"k": "v"})
    tensors, metadata = read_tensors(path)
    assert metadata == {"k": "v"}
    assert tensors["x"].dtype == dtype
    assert torch.equal(tensors["x"].view(torch.uint8), tensor.view(torch.uint8))


def test_strided_and_parameter_tensors_are_written_in_row_order(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "x", {"t": matrix.T, "p": torch.nn.Parameter(matrix)}, {})
    tensors, _ = read_tensors(tmp_path / "x")
    assert torch.equal(tensors["t"], matrix.T)
    assert torch.equal(tensors["p"], matrix)


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop], **changes}


DAMAGED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "pickle": pickle.dumps({"a": 1}) + b"x" * 20,
    "tiny pickle": pickle.dumps(0),
    "zip": b"PK\x03\x04" + b"x" * 20,
    "html": b"<!DOCTYPE html><html>",
    "huge header": struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
    "header past the end": struct.pack("<Q", 100) + b"{}",
    "not an object": packed(b"[1]"),
    "not JSON": packed(b"{x}"),
    "not UTF-8": packed(b'{"\xff": 1}'),
    "deep": packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "duplicate key": packed(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'),
    "duplicate inner key": packed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "number metadata": packed({"__metadata__": {"a": 1}}),
    "list metadata": packed({"__metadata__": []}),
    "truncated data": packed({"a": entry(0, 8)}, bytes(4)),
    "trailing bytes": packed({"a": entry(0, 8)}, bytes(9)),
    "hole": packed({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "overlap": packed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "twice the same place": packed({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "negative offset": packed({"a": entry(-4, 0, shape=[1])}, bytes(4)),
    "backwards": packed({"a": entry(8, 4, shape=[1])}, bytes(8)),
    "fraction": packed({"a": entry(0, 4, shape=[1.0])}, bytes(4)),
    "truth": packed({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "overflow": packed({"a": entry(0, 4, shape=[2**63, 2**63])}, bytes(4)),
    "many dimensions": packed({"a": entry(0, 4, shape=[1] * 1000)}, bytes(4)),
    "unknown dtype": packed({"a": entry(0, 4, dtype="F3")}, bytes(4)),
    "list dtype": packed({"a": entry(0, 4, dtype=[])}, bytes(4)),
    "extra field": packed({"a": entry(0, 4, more=1)}, bytes(4)),
    "entry is text": packed({"a": "b"}),
    "infinity": packed({"a": entry(0, 4)}, struct.pack("<f", float("inf"))),
    "NaN": packed({"a": entry(0, 4)}, struct.pack("<f", float("nan"))),
}


@pytest.mark.parametrize("contents", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(contents)
    with pytest.raises(CorruptError) as caught:
        read_tensors(path)
    assert caught.value.where.startswith(str(path))
    assert caught.value.fix


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:
    text = json.dumps({"a": entry(0, 4)}).encode().ljust(length)
    (tmp_path / "x").write_bytes(packed(text, bytes(4)))
    assert read_header(tmp_path / "x").tensors["a"].shape == (1,)


@pytest.mark.parametrize(("contents", "said"), [(DAMAGED["NaN"], ": a"), (DAMAGED["hole"], ": b")])
def test_the_tensor_at_fault_is_named(tmp_path: Path, contents: bytes, said: str) -> None:
    (tmp_path / "x").write_bytes(contents)
    with pytest.raises(CorruptError) as caught:
        read_tensors(tmp_path / "x")
    assert caught.value.where == f"{tmp_path / 'x'}{said}"


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        read_tensors(tmp_path / "none")
    with pytest.raises(CorruptError, match="folder"):
        read_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptError, match="regular"):
        read_tensors(tmp_path / "pipe")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_a_flipped_byte_or_a_cut_is_read_or_refused(tmp_path: Path, position: float, value: int, cut: bool) -> None:
    path = tmp_path / "x"
    write_tensors(path, TENSORS, METADATA)
    contents = bytearray(path.read_bytes())
    index = int(position * len(contents))
    contents[index] = value
    path.write_bytes(contents[:index] if cut else contents)
    try:
        read_tensors(path)
    except PipelineError:
        return
    assert not cut


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "x"
    write_tensors(path, TENSORS, METADATA)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="space"):
        write_tensors(path, {"a": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(_: str) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_tensors(tmp_path / "x", {"a": ("F32", (1,))}, {}, fail)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match="file"):
        write_tensors(tmp_path / "file" / "x", TENSORS, {})


def test_headers_are_read_without_torch_and_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.zeros(1000, 1000)}, METADATA)
    read: list[int] = []
    opened = builtins.open

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self, count: int) -> bytes:
            read.append(count)
            return bytes(self.file.read(count))

    monkeypatch.setattr(Path, "open", lambda self, mode: Counting(opened(self, mode)))
    assert read_header(path).tensors["a"].shape == (1000, 1000)
    assert sum(read) < 1000
    code = "import sys, lora_pipeline.adapters.header; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
