"""Everything that adapters do, side by side with what people use today: `python -m benchmarks.adapters [--json]`."""

from __future__ import annotations

import sys

from benchmarks import composition, extraction, merging
from benchmarks.rows import show

if __name__ == "__main__":
    show([*composition.rows(), *merging.rows(), *extraction.rows()], sys.argv)
