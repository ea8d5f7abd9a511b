from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lora_pipeline.pretrained.threads import SMALL, settle_threads


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_a_small_model_gets_one_thread() -> None:
    settle_threads(nn.Linear(4, 4))
    assert torch.get_num_threads() == 1


def test_a_large_model_keeps_what_it_was_given() -> None:
    with torch.device("meta"):
        settle_threads(nn.Linear(SMALL // 100, 100))
    assert torch.get_num_threads() == 4
