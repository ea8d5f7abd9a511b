"""A measured comparison, one row each, as a table or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """What was measured of ours and of the peer's.

    Args:
        what: What was done, with its size and unit.
        ours, peer: The measured numbers, of one unit.
        ratio: How much better ours is, or what `what` says it is.
        target: What the ratio should reach; None where there is none.
        met: Whether it does.
    """

    what: str
    ours: float
    peer: float
    ratio: float
    target: float | None
    met: bool | None


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of several runs, in seconds: what the machine's other work does not stretch."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def show(rows: Sequence[Row], arguments: Sequence[str]) -> None:
    """Writes rows to standard output, as JSON if `--json` is among the arguments."""
    if "--json" in arguments:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return
    sys.stdout.write("| what | ours | peer | ratio | target | met |\n| --- | --- | --- | --- | --- | --- |\n")
    for row in rows:
        target = "" if row.target is None else f"{row.target:g}"
        met = {True: "yes", False: "no", None: ""}[row.met]
        sys.stdout.write(f"| {row.what} | {row.ours:.4g} | {row.peer:.4g} | {row.ratio:.3g} | {target} | {met} |\n")
