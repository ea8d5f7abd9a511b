"""Raw pictures become squares with captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_pipeline.data.captions import fill_template
from lora_pipeline.data.dataset import content_hash, load_pixels, read_examples
from lora_pipeline.data.preprocessing import cut_square, preprocess
from lora_pipeline.errors import CorruptError, MissingError, PipelineError


def concept(**changes: Any) -> Any:
    settings = {"resolution": 16, "crop": "center", "captions": "files", "template": "a {token} {noun}"}
    values = {"kind": "subject", "placeholder_token": "<zorp>", "class_noun": "creature"}
    values |= {name: value for name, value in changes.items() if name in values}
    settings |= {name: value for name, value in changes.items() if name in settings}
    return SimpleNamespace(preprocess=SimpleNamespace(**settings), **values)


def silent(done: int) -> None:
    del done


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for name in ("x", "y"):
        Image.fromarray(noise).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a <zorp> creature, {name}\n")
    return folder


def run(raw: Path, out: Path, settings: Any, seed: int = 0) -> dict[str, bytes]:
    out.mkdir()
    preprocess(raw, out, settings, seed, silent)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize("crop", ["center", "random"])
def test_same_pictures_same_bytes_wherever_they_are(raw: Path, tmp_path: Path, crop: str) -> None:
    first = run(raw, tmp_path / "a", concept(crop=crop))
    moved = raw.rename(tmp_path / "elsewhere")
    assert run(moved, tmp_path / "b", concept(crop=crop)) == first
    assert sorted(first) == ["000.png", "001.png", "metadata.jsonl"]
    rows = [json.loads(line) for line in first["metadata.jsonl"].splitlines()]
    assert rows[1] == {"file_name": "001.png", "text": "a <zorp> creature, y", "source": "y.png"}


def test_random_crops_follow_the_seed_and_differ_by_picture(raw: Path, tmp_path: Path) -> None:
    first = run(raw, tmp_path / "a", concept(crop="random"), seed=0)
    other = run(raw, tmp_path / "b", concept(crop="random"), seed=1)
    assert first["000.png"] != other["000.png"]
    assert first["000.png"] != first["001.png"]  # the same pixels, under another name


def test_a_square_is_the_middle_of_the_picture() -> None:
    ramp = np.tile(np.arange(60, dtype=np.uint8)[None, :, None], (20, 1, 3))
    square = np.asarray(cut_square(Image.fromarray(ramp), 20, None))
    np.testing.assert_array_equal(square, ramp[:, 20:40])


@pytest.mark.parametrize("size", [(16, 16), (7, 300), (300, 7), (17, 16), (1, 1)])
def test_every_shape_becomes_a_square(size: tuple[int, int]) -> None:
    for seed in (None, "0/a.png"):
        square = cut_square(Image.new("RGB", size, "red"), 16, seed)
        assert square.size == (16, 16)
        assert square.getextrema() == ((255, 255), (0, 0), (0, 0))


def test_templates_name_the_concept(raw: Path, tmp_path: Path) -> None:
    (raw / "x.txt").unlink()
    run(raw, tmp_path / "a", concept(captions="template"))
    assert [example.caption for example in read_examples(tmp_path / "a")] == ["a <zorp> creature"] * 2
    assert fill_template("a {token} {noun}", None, "creature") == "a creature"


@pytest.mark.parametrize(
    ("caption", "settings", "missing"),
    [
        ("a creature", {}, "<zorp>"),
        ("a <zorp> dog", {}, "creature"),
        ("a <zorp> creatures", {}, "creature"),
        ("a dog", {"placeholder_token": None}, "creature"),
    ],
)
def test_captions_without_the_concept_are_refused(
    raw: Path, tmp_path: Path, caption: str, settings: dict[str, Any], missing: str
) -> None:
    (raw / "y.txt").write_text(caption)
    with pytest.raises(CorruptError, match=missing) as caught:
        run(raw, tmp_path / "a", concept(**settings))
    assert caught.value.where.endswith("y.txt")


def test_a_style_needs_no_noun(raw: Path, tmp_path: Path) -> None:
    (raw / "y.txt").write_text("a <ZORP> picture of a dog")
    run(raw, tmp_path / "a", concept(kind="style"))


@pytest.mark.parametrize("damage", ["no caption", "empty caption", "binary caption", "picture"])
def test_damage_is_named(raw: Path, tmp_path: Path, damage: str) -> None:
    damages: dict[str, Callable[[], object]] = {
        "no caption": lambda: (raw / "y.txt").unlink(),
        "empty caption": lambda: (raw / "y.txt").write_text(" \n"),
        "binary caption": lambda: (raw / "y.txt").write_bytes(b"\xff\xfe\x00"),
        "picture": lambda: (raw / "y.png").write_bytes(b"GIF89a"),
    }
    damages[damage]()
    with pytest.raises(PipelineError) as caught:
        run(raw, tmp_path / "a", concept())
    assert Path(caught.value.where).stem == "y"


def test_examples_come_back_as_they_went(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "a", concept())
    examples = read_examples(tmp_path / "a")
    pixels = load_pixels(examples)
    assert pixels.shape == (2, 3, 16, 16)
    stored = torch.from_numpy(np.array(Image.open(examples[1].image))).permute(2, 0, 1)
    torch.testing.assert_close((pixels[1] + 1) * 127.5, stored.float())
    before = content_hash(examples)
    (tmp_path / "a" / "001.png").write_bytes((tmp_path / "a" / "000.png").read_bytes())
    assert before == content_hash(examples)  # the same picture twice
    Image.new("RGB", (16, 16)).save(tmp_path / "a" / "001.png")
    assert before != content_hash(examples)


@pytest.mark.parametrize(
    "row",
    [
        "[]", "{", '{"file_name": "000.png"}', '{"file_name": "../a/000.png", "text": ""}',
        '{"file_name": "000.png", "text": ""}',
    ],
)  # fmt: skip
def test_broken_metadata_is_refused(raw: Path, tmp_path: Path, row: str) -> None:
    run(raw, tmp_path / "a", concept())
    with (tmp_path / "a" / "metadata.jsonl").open("a") as file:
        file.write(row)
    with pytest.raises(CorruptError, match=r"metadata\.jsonl:3"):
        read_examples(tmp_path / "a")


def test_missing_parts_of_a_dataset_are_named(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"metadata\.jsonl"):
        read_examples(raw)
    run(raw, tmp_path / "a", concept())
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "001.png")
    with pytest.raises(CorruptError, match=r"001\.png: is 8 x 8"):
        load_pixels(read_examples(tmp_path / "a"))
    (tmp_path / "a" / "001.png").unlink()
    with pytest.raises(MissingError, match=r"001\.png"):
        read_examples(tmp_path / "a")
