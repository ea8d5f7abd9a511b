"""How well the committed judge reads fresh drawings."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_pipeline.toyworld.judge import HEADS, Judge, load_judge
from lora_pipeline.toyworld.judge_card import accuracy, likeness
from lora_pipeline.toyworld.judge_pool import own, streamed

JUDGE = Path(__file__).parents[3] / "models" / "judge"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(JUDGE)


@pytest.mark.parametrize("stream", ["fresh-world", "fresh-composites"])
def test_the_committed_judge_reads_fresh_drawings(judge: Judge, stream: str) -> None:
    shares = accuracy(judge, *streamed(stream, 200, seed=17))
    assert {head: share for head, share in shares.items() if head in HEADS and share < 0.95} == {}


def test_the_committed_judge_reads_stickers_of_known_things(judge: Judge) -> None:
    shares = accuracy(judge, *own("stickers", 100, seed=17))
    assert min(shares["kind"], shares["colour"], shares["background"], shares["style"]) >= 0.9


def test_the_committed_judge_tells_the_mascots_apart(judge: Judge) -> None:
    cosines = likeness(judge, seed=17)
    assert min(cosines["zorp, zorp"], cosines["mimo, mimo"]) > 0.9
    assert cosines["zorp, mimo"] < 0.2
    assert max(cosines["zorp, any creature"], cosines["mimo, any creature"]) < 0.5
