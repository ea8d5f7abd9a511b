"""The exponential moving average of what learns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """average = d · average + (1 - d) · value after every step, with d = min(decay, n / (9 + n)) after step n > 1.

    The smaller decay of the first steps, which is diffusers' (`EMAModel`), forgets where learning started.

    Args:
        parameters: What learns.
        decay: In (0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def follow(self, steps: int) -> None:
        """After step number `steps`, from 1."""
        decay = 0.0 if steps == 1 else min(self.decay, steps / (9 + steps))
        averages, values = list(self.tensors.values()), [each.detach() for each in self.parameters.values()]
        torch._foreach_lerp_(averages, values, 1.0 - decay)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from another run's `tensors`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def take_over(self) -> None:
        """The average takes the place of what was learnt last."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.tensors[name])
