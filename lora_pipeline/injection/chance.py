"""Dropout that is counted, not streamed: a forward pass that is repeated, or a run that is resumed, drops the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass
class Chance:
    """What a run's branches leave out while they learn. All of them share one.

    Args:
        inputs: Share of a branch's inputs that are left out, in [0, 1) as the others.
        ranks: Share of a branch's ranks, for all examples of a batch.
        branches: Share of the branches, whole. Inputs and ranks that stay are scaled up by what went, whole branches
            are not (as in kohya's sd-scripts).
        generator: For a batch's number and a purpose; the same for the same.
        batch: The number of the batch that is learnt from; None leaves nothing out.
    """

    inputs: float
    ranks: float
    branches: float
    generator: Callable[[int, str], Generator]
    batch: int | None = None

    def drops(self, share: float) -> bool:
        """Whether anything is left out at this moment, of what has such a share."""
        return share > 0.0 and self.batch is not None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def kept(self, share: float, purpose: str, like: Tensor) -> Tensor:
        """Factors for a tensor, shaped and placed as it is: 0 where it is left out, else 1 / (1 - share)."""
        assert self.batch is not None
        drawn = torch.rand(like.shape, generator=self.generator(self.batch, purpose))
        return ((drawn >= share) / (1.0 - share)).to(like)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def skips(self, target: str) -> bool:
        """Whether a layer's whole branch is left out."""
        assert self.batch is not None
        return float(torch.rand((), generator=self.generator(self.batch, f"branch {target}"))) < self.branches
