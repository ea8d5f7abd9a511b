from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_pipeline.data.dataset import read_examples
from lora_pipeline.params import PriorsParams
from lora_pipeline.pretrained.components import Components
from lora_pipeline.rendering import sampling
from lora_pipeline.rendering.priors import BLOCK, cache_folder, write_priors


def wanted(count: int, **changes: object) -> PriorsParams:
    return PriorsParams.model_validate(
        {"count": count, "prompt": "a dog", "steps": 2, "guidance_scale": 1.0, **changes}
    )


def contents(folder: Path) -> list[bytes]:
    return [example.image.read_bytes() for example in read_examples(folder)]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of pictures of each call of `sample`."""
    calls: list[int] = []
    real = sampling.sample

    def counted(components: Components, prompts: list[str], *args: object, **options: object) -> object:
        calls.append(len(prompts))
        return real(components, prompts, *args, **options)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(sampling, "sample", counted)
    return calls


def test_a_grown_count_draws_only_what_is_new_and_the_bytes_of_one_go(
    components: Components, tmp_path: Path, blocks: list[int]
) -> None:
    grown = tmp_path / "grown-cache"
    write_priors(components, wanted(BLOCK + 2), 7, grown, tmp_path / "first")
    write_priors(components, wanted(BLOCK + 5), 7, grown, tmp_path / "more")
    assert blocks == [BLOCK] * 2
    write_priors(components, wanted(2 * BLOCK + 1), 7, grown, tmp_path / "most")
    assert blocks == [BLOCK] * 3
    write_priors(components, wanted(2 * BLOCK + 1), 7, tmp_path / "fresh-cache", tmp_path / "at-once")
    assert contents(tmp_path / "most") == contents(tmp_path / "at-once")
    assert contents(tmp_path / "most")[: BLOCK + 2] == contents(tmp_path / "first")
    assert len(set(contents(tmp_path / "most"))) == 2 * BLOCK + 1


def test_a_damaged_cache_is_drawn_again(components: Components, tmp_path: Path) -> None:
    write_priors(components, wanted(3), 7, tmp_path / "cache", tmp_path / "first")
    for name, content in (("0000.png", b""), ("0001.png", (tmp_path / "cache" / "0001.png").read_bytes()[:-30])):
        (tmp_path / "cache" / name).write_bytes(content)
    write_priors(components, wanted(3), 7, tmp_path / "cache", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "first")


def test_count_0_is_an_empty_table(components: Components, tmp_path: Path) -> None:
    write_priors(components, wanted(0), 7, tmp_path / "cache", tmp_path / "out")
    assert (tmp_path / "out" / "metadata.jsonl").read_text() == ""
    assert read_examples(tmp_path / "out") == ()


def test_captions_are_the_prompt_and_progress_is_told(components: Components, tmp_path: Path) -> None:
    done: list[int] = []
    write_priors(components, wanted(BLOCK + 1), 7, tmp_path / "cache", tmp_path / "out", done.append)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert lines[-1] == {"file_name": f"{BLOCK:04}.png", "text": "a dog"}
    assert done == [BLOCK, BLOCK + 1]


def test_all_but_the_count_decides_the_cache(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    folders = [
        cache_folder(tmp_path, base, wanted(1), 7),
        cache_folder(tmp_path, base, wanted(1), 8),
        cache_folder(tmp_path, base, wanted(1, steps=3), 7),
        cache_folder(tmp_path, base, wanted(1, prompt="a cat"), 7),
    ]
    assert cache_folder(tmp_path, base, wanted(2), 7) == folders[0]
    (base / "weights").write_bytes(b"other")
    folders.append(cache_folder(tmp_path, base, wanted(1), 7))
    assert len(set(folders)) == 5
