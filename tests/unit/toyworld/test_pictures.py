"""Numbered pictures: the same ones whoever draws them, in whatever order."""

from __future__ import annotations

import numpy as np
import pytest

from lora_pipeline.toyworld import pictures as module
from lora_pipeline.toyworld.pictures import STREAMS, picture, pictures


@pytest.mark.parametrize("stream", STREAMS)
def test_a_picture_is_a_function_of_its_number(stream: str) -> None:
    last, first = picture(stream, 5), picture(stream, 0)
    (chunk,) = pictures(stream, 6)
    assert chunk[5].scene == last.scene
    assert chunk[5].caption == last.caption
    assert np.array_equal(chunk[5].pixels, last.pixels)
    assert np.array_equal(chunk[0].pixels, first.pixels)
    assert first.pixels.shape == (64, 64, 3)
    assert first.pixels.dtype == np.uint8


def test_streams_and_seeds_show_different_pictures() -> None:
    shown = [picture(stream, 0, seed).pixels.tobytes() for stream in STREAMS for seed in (0, 1)]
    assert len(set(shown)) == len(shown)


def test_chunks_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [p.pixels for chunk in pictures("world", 5) for p in chunk]
    monkeypatch.setattr(module, "CHUNK", 2)
    chunks = list(pictures("world", 5))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert np.array_equal(np.stack([p.pixels for chunk in chunks for p in chunk]), np.stack(whole))


def test_worker_processes_draw_the_same_bytes() -> None:
    (alone,), (helped,) = pictures("world", 4), pictures("world", 4, workers=2)
    assert np.array_equal(np.stack([p.pixels for p in helped]), np.stack([p.pixels for p in alone]))
    assert [p.caption for p in helped] == [p.caption for p in alone]
