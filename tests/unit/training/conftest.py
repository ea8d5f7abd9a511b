"""Params of a training run, and a problem small enough to solve in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def params() -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        values = {
            "method": "pti", "prior_weight": 1.0, "batch_size": 2, "rank": 2, "alpha": 2.0,
            "unet_targets": ["*attn*.to_q"], "text_encoder_targets": [], "inversion_steps": 3,
            "inversion_learning_rate": 0.02, "tuning_steps": 4, "tuning_learning_rate": 0.002,
            "initializer": "creature", "vectors": 1, "caption_dropout": 0.0, "checkpoint_every": 2,
        }  # fmt: skip
        return SimpleNamespace(**(values | changes))

    return make
