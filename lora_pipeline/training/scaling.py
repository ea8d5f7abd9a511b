"""The factor that lifts a float16 loss, so that its gradients are not rounded to zero."""

from __future__ import annotations

from dataclasses import dataclass

_DOUBLE_AFTER = 2000


@dataclass
class LossScale:
    """Halved when a gradient overflows, and that step is left out; doubled after 2000 good steps.

    Micikevicius et al. 2017, arXiv:1710.03740, section 3.2. A power of two, so that dividing by it is exact.
    """

    value: float = 65536.0
    good: int = 0

    def overflowed(self) -> None:
        """The step's gradient was not finite."""
        self.value, self.good = self.value / 2, 0

    def worked(self) -> None:
        """The step's gradient was finite."""
        self.good += 1
        if self.good == _DOUBLE_AFTER:
            self.value, self.good = self.value * 2, 0
