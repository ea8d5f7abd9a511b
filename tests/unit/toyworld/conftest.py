"""The committed judge, and one that has learned nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_pipeline.toyworld.judge import Judge, blank_judge, load_judge

JUDGE = Path(__file__).parents[3] / "models" / "judge"


@pytest.fixture(scope="session")
def judge() -> Judge:
    return load_judge(JUDGE)


@pytest.fixture(scope="session")
def blank() -> Judge:
    return blank_judge(0).eval().requires_grad_(False)
