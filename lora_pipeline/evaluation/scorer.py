"""What reads pictures: the toy world's judge, or a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor


class Scorer(Protocol):
    """Pictures are uint8 (n, height, width, 3); vectors are float32 rows of unit length."""

    def identity(self, images: np.ndarray) -> Tensor:
        """(n, d): near for pictures of one subject."""
        ...

    def style(self, images: np.ndarray) -> Tensor:
        """(n, d): near for pictures in one style."""
        ...

    def prompt_accuracy(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """(n,) in [0, 1]: how well each picture shows what its prompt asks for."""
        ...
