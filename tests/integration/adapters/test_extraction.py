"""What `merge` folded into a base, `extract` takes out of it again; through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_pipeline.adapters import load_adapter, save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.fingerprint import base_fingerprint
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.merging import merge
from lora_pipeline.adapters.weights import open_weights
from lora_pipeline.errors import CorruptError, PipelineError, UsageError
from stages.app import dispatch

MakeAdapter = Callable[..., Adapter]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PIPE_TRACKING", "off")


@pytest.fixture
def adapter(make_adapter: MakeAdapter) -> Adapter:
    return make_adapter(1, tokens={"<zorp>": 2, "<one>": 1})


@pytest.fixture
def merged(base: Path, adapter: Adapter) -> Path:
    merge(base, [("zorp", adapter, 1.0)], Path("merged"), "float32")
    return Path("merged")


def extract(*arguments: str | Path) -> None:
    """As on the command line, where a command that ends well ends the process."""
    with pytest.raises(SystemExit) as ended:
        dispatch(["extract", *map(str, arguments)])
    assert ended.value.code == 0


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def test_merge_then_extract_gives_back_the_change_and_the_tokens(base: Path, adapter: Adapter, merged: Path) -> None:
    extract(merged, "--base", base, "--error", "1e-4", "--out", "out.safetensors")
    found = load_adapter(Path("out.safetensors"))
    assert found.factors.keys() == adapter.factors.keys()
    for target, factors in adapter.factors.items():
        assert found.factors[target].rank == factors.rank
        assert found.factors[target].down.ndim == factors.down.ndim
        assert relative(found.factors[target].delta(), factors.delta()) < 1e-5
    assert found.embeddings.keys() == {"<zorp>", "<one>"}
    assert all(torch.equal(found.embeddings[token], rows) for token, rows in adapter.embeddings.items())
    assert found.provenance["base"] == base_fingerprint(base)
    assert found.provenance["parents"] == [{"name": "merged", "sha256": base_fingerprint(merged), "weight": 1.0}]


def test_the_extracted_adapter_merges_to_the_same_model(base: Path, merged: Path) -> None:
    extract(merged, "--base", base, "--rank", "8", "--out", "out.safetensors")
    merge(base, [("out", load_adapter(Path("out.safetensors")), 1.0)], Path("again"), "float32")
    before, after = open_weights(merged), open_weights(Path("again"))
    assert before.places.keys() == after.places.keys()
    for name in before.places:
        assert torch.allclose(before.read(name), after.read(name), atol=1e-6), name


def test_the_report_tells_every_layer(
    base: Path, adapter: Adapter, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(merged, "--base", base, "--rank", "1", "--out", "out.safetensors", "--report", "reports/out.json")
    report = json.loads(Path("reports/out.json").read_text())
    assert report["layers"].keys() == adapter.factors.keys()
    for target, factors in adapter.factors.items():
        values = torch.linalg.svdvals(factors.delta().double().flatten(1))
        told = report["layers"][target]
        assert told["rank"] == 1
        assert told["energy"] == pytest.approx(float(values[0].square() / values.square().sum()), rel=1e-3)
        assert told["error"] == pytest.approx(float(values[1:].norm() / values.norm()), abs=1e-3)
        assert told["norm"] == pytest.approx(float(values.norm()), rel=1e-4)
    assert report["left_out"] == {}
    with Image.open("reports/out.png") as picture:
        assert len(picture.convert("RGB").getcolors(10_000) or []) >= 5
    assert f"{report['error']:.1%}" in capsys.readouterr().out


def test_an_adapter_is_cut_down_without_its_base(adapter: Adapter) -> None:
    save_adapter(adapter, Path("large.safetensors"))
    extract("large.safetensors", "--rank", "1", "--alpha", "4", "--out", "small.safetensors", "--report", "small.json")
    found = load_adapter(Path("small.safetensors"))
    for target, factors in adapter.factors.items():
        left, values, right = torch.linalg.svd(factors.delta().double().flatten(1), full_matrices=False)
        best = (left[:, :1] * values[:1] @ right[:1]).reshape(factors.delta().shape)
        assert (found.factors[target].rank, found.factors[target].alpha) == (1, 4.0)
        assert relative(found.factors[target].delta(), best.float()) < 1e-5
    assert found.embeddings.keys() == adapter.embeddings.keys()
    assert found.provenance["note"] == "random"
    assert json.loads(Path("small.json").read_text())["energy"] < 1


def test_the_same_command_writes_the_same_bytes(base: Path, merged: Path) -> None:
    for name in ("a", "b"):
        extract(merged, "--base", base, "--rank", "2", "--out", f"{name}.safetensors", "--report", f"{name}.json")
    for suffix in ("safetensors", "json", "png"):
        assert Path(f"a.{suffix}").read_bytes() == Path(f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("choice", ["null", "1", "{error: 0.3, max_rank: 2}"])
def test_a_concept_is_cut_as_params_say(choice: str, base: Path, adapter: Adapter) -> None:
    params = (Path(__file__).parents[3] / "params.yaml").read_text("utf-8")
    Path("params.yaml").write_text(params.replace("rank: null  ", f"rank: {choice}  ", 1), "utf-8")
    trained = replace(adapter, provenance={"base": base_fingerprint(base), "data": "d"})
    save_adapter(trained, Path("tuned/tuned.safetensors"))
    extract("--concept", "zorp", "--tuned", "tuned", "--base", base, "--out", "zorp.safetensors")
    found = load_adapter(Path("zorp.safetensors"))
    most = {"null": 3, "1": 1}.get(choice, 2)
    assert max(factors.rank for factors in found.factors.values()) == most
    assert found.provenance["data"] == "d"
    assert (found.provenance["residual"] == 0.0) == (choice == "null")


@pytest.mark.parametrize(
    ("options", "kind", "where"),
    [
        (["MODEL", "--base", "BASE", "--rank", "0"], UsageError, "--rank"),
        (["MODEL", "--base", "BASE", "--energy", "1.5"], UsageError, "--energy"),
        (["MODEL", "--base", "BASE", "--error", "1"], UsageError, "--error"),
        (["MODEL", "--base", "BASE", "--rank", "4", "--max-rank", "0"], UsageError, "--max-rank"),
        (["MODEL", "--base", "BASE", "--rank", "4", "--energy", "0.9"], UsageError, "--rank and --energy"),
        (["MODEL", "--base", "BASE"], UsageError, "extract"),
        (["MODEL", "--base", "BASE", "--rank", "1", "--device", "tpu"], UsageError, "--device tpu"),
        (["MODEL", "--base", "BASE", "--rank", "1", "--targets", "*.to_x"], UsageError, "*.to_x"),
        (["MODEL", "--base", "BASE", "--rank", "1"], CorruptError, "the tuned model"),
        (["ADAPTER"], UsageError, "extract"),
        (["ADAPTER", "--rank", "1", "--report", "out.png"], UsageError, "--report out.png"),
        (["MODEL", "--rank", "4"], UsageError, "BASE"),
        (["ADAPTER", "--rank", "1", "--targets", "*"], UsageError, "ADAPTER"),
        (["ADAPTER", "--base", "BASE", "--rank", "1", "--clamp-quantile", "0.99"], UsageError, "ADAPTER"),
        (["ADAPTER", "--base", "BASE", "--rank", "1"], CorruptError, "ADAPTER"),  # says it is another base's
        (["ADAPTER", "--alpha", "0"], UsageError, "--alpha"),
        (["--rank", "4"], UsageError, "extract"),
        (["--concept", "zorp", "--tuned", "t", "--base", "BASE", "--rank", "4"], UsageError, "extract"),
    ],
)
def test_what_cannot_be_is_refused_and_the_old_file_stays(
    options: list[str], kind: type[PipelineError], where: str, base: Path
) -> None:
    save_adapter(
        Adapter({"unet.a": LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)}, {}, {"base": "b"}),
        Path("adapter.safetensors"),
    )
    paths = {"MODEL": str(base), "BASE": str(base), "ADAPTER": "adapter.safetensors"}
    Path("out.safetensors").write_text("the old one")
    with pytest.raises(kind) as caught:
        dispatch(["extract", *(paths.get(each, each) for each in options), "--out", "out.safetensors"])
    assert caught.value.where == paths.get(where, where)
    assert Path("out.safetensors").read_text() == "the old one"
    assert sorted(path.name for path in Path.cwd().glob("*out*")) == ["out.safetensors"]
