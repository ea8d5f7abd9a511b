"""Masks beside pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_pipeline.data.dataset import content_hash, load_pixels, read_examples
from lora_pipeline.data.images import list_pictures, open_mask
from lora_pipeline.data.masks import load_masks
from lora_pipeline.data.preprocessing import preprocess
from lora_pipeline.errors import CorruptError, MissingError


def concept(crop: str = "center") -> Any:
    settings = SimpleNamespace(resolution=16, crop=crop, captions="template", template="a {token} {noun}")
    return SimpleNamespace(preprocess=settings, kind="subject", placeholder_token="<zorp>", class_noun="creature")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two pictures, the first with a mask that is the picture itself: white to the right, black to the left."""
    folder = tmp_path / "raw"
    folder.mkdir()
    steps = np.zeros((32, 64), np.uint8)
    steps[:, 30:] = 255
    Image.fromarray(steps).convert("RGB").save(folder / "a.jpg", quality=100)
    Image.fromarray(steps).save(folder / "a.mask.png")
    Image.new("RGB", (40, 20), "red").save(folder / "b.png")
    return folder


def run(raw: Path, crop: str = "center", seed: int = 0) -> Path:
    out = raw.parent / f"out{len(list(raw.parent.iterdir()))}"
    out.mkdir()
    preprocess(raw, out, concept(crop), seed, lambda _: None)
    return out


@pytest.mark.parametrize(("crop", "seed"), [("center", 0), ("random", 1), ("random", 2)])
def test_masks_are_cut_as_their_pictures_are(raw: Path, crop: str, seed: int) -> None:
    out = run(raw, crop, seed)
    assert sorted(path.name for path in out.iterdir()) == ["000.mask.png", "000.png", "001.png", "metadata.jsonl"]
    first, second = read_examples(out)
    assert first.mask == out / "000.mask.png"
    assert second.mask is None
    mask = np.asarray(open_mask(out / "000.mask.png")).astype(int)
    picture = np.asarray(Image.open(out / "000.png").convert("L")).astype(int)
    assert 0 < mask.mean() < 255 or crop == "random"
    assert np.abs(mask - picture).max() < 40  # Lanczos overshoots where the mask may not
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert rows[0]["mask_file_name"] == "000.mask.png"
    assert set(rows[1]) == {"file_name", "text", "source"}


def test_masks_are_loaded_as_shares_and_missing_ones_are_white(raw: Path) -> None:
    examples = read_examples(run(raw))
    masks = load_masks(examples, (16, 16))
    assert masks.shape == (2, 1, 16, 16)
    assert set(masks[0, 0, 0].tolist()) == {0.0, 1.0}
    assert bool((masks[1] == 1).all())
    assert load_pixels(examples).shape == (2, 3, 16, 16)


def test_masks_count_as_content(raw: Path) -> None:
    examples = read_examples(run(raw))
    without = tuple(dataclasses.replace(each, mask=None) for each in examples)
    before = content_hash(examples)
    assert before != content_hash(without)
    Image.new("L", (16, 16), "white").save(str(examples[0].mask))
    assert content_hash(examples) != before


def test_masks_are_never_pictures_and_never_left_out_silently(raw: Path) -> None:
    assert [path.name for path in list_pictures(raw)] == ["a.jpg", "b.png"]
    Image.new("L", (2, 2)).save(raw / "c.mask.png")
    with pytest.raises(CorruptError, match=r"c\.mask\.png: is the mask of no picture"):
        list_pictures(raw)


def test_transparent_parts_of_a_mask_are_black(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 255, 255, 51)).save(tmp_path / "a.png")
    assert open_mask(tmp_path / "a.png").getpixel((0, 0)) == 51


@pytest.mark.parametrize(
    ("size", "box", "problem"),
    [
        ((32, 32), (0, 0, 32, 32), "is 32 x 32, and its picture 64 x 32"),
        ((64, 32), (0, 0, 0, 0), "is black everywhere"),
        ((64, 32), (0, 0, 10, 32), "is black everywhere"),  # what is white is cut off
    ],
)
def test_masks_that_cannot_be_are_refused(
    raw: Path, size: tuple[int, int], box: tuple[int, int, int, int], problem: str
) -> None:
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(raw / "a.mask.png")
    with pytest.raises(CorruptError, match=f"a.mask.png: {problem}"):
        run(raw)


def test_masks_that_were_changed_since_are_refused(raw: Path) -> None:
    examples = read_examples(run(raw))
    for size, problem in (((8, 8), "8 x 8"), ((16, 16), "black everywhere")):
        Image.new("L", size).save(str(examples[0].mask))
        with pytest.raises(CorruptError, match=problem):
            load_masks(examples, (16, 16))
    (examples[0].image.parent / "000.mask.png").unlink()
    with pytest.raises(MissingError, match=r"000\.mask\.png"):
        read_examples(examples[0].image.parent)
