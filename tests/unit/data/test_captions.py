"""Captions whose parts change places."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_pipeline.data.captions import orders_of, shuffled

TAGS = st.lists(st.text("ab <>", min_size=1).filter(str.strip), min_size=1, max_size=6)


@given(TAGS, st.integers(0, 7), st.integers(0, 100))
def test_no_part_is_lost_and_those_kept_stay(tags: list[str], kept: int, seed: int) -> None:
    stripped = [tag.strip() for tag in tags]
    found = shuffled(",".join(tags), kept, torch.Generator().manual_seed(seed)).split(",")
    assert Counter(part.strip() for part in found) == Counter(stripped)
    assert [part.strip() for part in found][:kept] == stripped[:kept]


@pytest.mark.parametrize(
    ("caption", "kept", "count"), [("a, b, c", 1, 2), ("a, b, c", 0, 6), ("a, b", 1, 1), ("", 0, 1), ("a,, b,", 0, 2)]
)
def test_all_orders_come_and_are_counted(caption: str, kept: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    assert len({shuffled(caption, kept, generator) for _ in range(100)}) == count == orders_of(caption, kept)


def test_a_caption_with_nothing_to_move_stays_as_it_is() -> None:
    assert shuffled("a <zorp>,on a beach", 1, torch.Generator()) == "a <zorp>,on a beach"
