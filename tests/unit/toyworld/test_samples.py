"""The sample concepts: what is committed is what the library draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_pipeline.toyworld.expectation import expectation
from lora_pipeline.toyworld.samples import write_samples

RAW = Path(__file__).parents[3] / "data" / "raw"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("raw")
    write_samples(raw)
    return raw


@pytest.mark.parametrize("concept", ["zorp", "mimo", "sticker"])
def test_the_committed_pictures_are_the_drawn_ones(written: Path, concept: str) -> None:
    names = sorted(path.name for path in (written / concept).iterdir())
    assert names == sorted(f"{n}.{kind}" for n in range(1, 6) for kind in ("png", "txt"))
    for name in names:
        drawn, kept = written / concept / name, RAW / concept / name
        if name.endswith(".txt"):
            assert kept.read_text() == drawn.read_text()
        else:
            assert np.array_equal(np.asarray(Image.open(kept)), np.asarray(Image.open(drawn)))


def test_captions_carry_the_token_beside_its_noun_or_the_style(written: Path) -> None:
    for name in ("zorp", "mimo"):
        captions = [path.read_text() for path in (written / name).glob("*.txt")]
        assert all(f"<{name}> creature" in caption for caption in captions)
        assert len({expectation(caption).background for caption in captions}) == 5
    stickers = [expectation(path.read_text()) for path in (written / "sticker").glob("*.txt")]
    assert {asked.style for asked in stickers} == {"sticker"}
    assert len({asked.things[0].kind for asked in stickers}) == 5
