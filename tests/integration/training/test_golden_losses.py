"""Five steps of each method lose what they lost when the values were written."""

from __future__ import annotations

import json

import golden_runs
import pytest

pytestmark = pytest.mark.filterwarnings("default::FutureWarning")


@pytest.mark.parametrize("run", golden_runs.RUNS)
def test_losses_are_those_that_were_written(run: str) -> None:
    written = json.loads(golden_runs.LOSSES.read_text(encoding="utf-8"))
    assert golden_runs.losses(run) == pytest.approx(written[run], rel=golden_runs.TOLERANCE)


def test_no_method_is_without_golden_losses() -> None:
    from lora_pipeline.training.phases import METHODS

    written = json.loads(golden_runs.LOSSES.read_text(encoding="utf-8"))
    assert set(written) == set(golden_runs.RUNS) == set(METHODS)
