"""Steps a second and peak memory of training, against diffusers' DreamBooth-LoRA example: `python -m benchmarks.train`.

With `--json` as JSON. Both sides have the same base, pictures, batch, precision, threads, rank and layers; ours is
`training.tuning.tune` itself. Each side has a process of its own, and they take turns: a round is some steps of each,
so that what else the machine does meets both. Times are those of the fastest round, as it is the least disturbed.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row, show

if TYPE_CHECKING:
    from lora_pipeline.params.training import TrainParams

SHIPPED, CACHED, OURS, COMPILED = "example", "example with caches", "ours", "ours with compile"
PEERS = {SHIPPED: False, CACHED: True}


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Args:
        base: See `bases.make_base`.
        batch: Pictures a step.
        rank: Of the adapter.
        steps: A side's in each round.
        rounds: How many.
        targets: What the ratio to the example as shipped should reach, by side of ours.
    """

    base: str
    batch: int
    rank: int
    steps: int
    rounds: int
    targets: Mapping[str, float]


ON_CPU = (
    Setting("tenth", 1, 4, 20, 9, {OURS: 1.5, COMPILED: 1.9}),
    Setting("embedded", 1, 4, 40, 9, {OURS: 1.5}),
)
ON_GPU = (
    Setting("sd15", 1, 16, 50, 5, {COMPILED: 3.0}),
    Setting("sd15", 8, 16, 20, 5, {COMPILED: 1.5}),
)


class _Enough(Exception):  # noqa: N818  # it is no error
    """The other end has all its rounds."""


class Pace:
    """Called after every step: says how long some steps took, and waits to be told how many come next."""

    def __init__(self, connection: Connection, warm_up: int) -> None:
        self.connection = connection
        self.left = warm_up
        self.start = time.perf_counter()

    def __call__(self) -> None:
        """Counts a step.

        Raises:
            _Enough: No more are wanted.
        """
        self.left -= 1
        if self.left:
            return
        synchronise()
        self.connection.send(time.perf_counter() - self.start)
        self.left = self.connection.recv()
        if not self.left:
            raise _Enough
        self.start = time.perf_counter()


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> float:
    """The most memory this process has had, in MB; on a GPU, that of its tensors there."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def compete(setting: Setting, side: str, folder: Path, connection: Connection) -> None:
    """A side's process: trains until it is told to stop, then says its peak of memory."""
    import torch

    warnings.simplefilter("ignore")
    from benchmarks import bases, dreambooth

    work = folder / side
    work.mkdir()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    base = bases.make_base(setting.base, work)
    torch.set_num_threads(threads)  # small bases get one, and the example knows nothing of that
    pace, pixels = Pace(connection, setting.steps), bases.pixels_of(setting.base)
    with contextlib.suppress(_Enough):
        if side in PEERS:
            dreambooth.run(
                base, folder / "pictures", pixels, setting.batch, setting.rank, cached=PEERS[side], after_step=pace
            )
        else:
            _train(base, setting, side == COMPILED, folder / "pictures", work, pace)
    connection.send(peak())


def _train(base: Any, setting: Setting, compiled: bool, pictures: Path, work: Path, pace: Callable[[], None]) -> None:
    import torch

    from lora_pipeline.data.dataset import read_examples
    from lora_pipeline.training.tuning import Task, tune

    params = _params(setting, compiled, "bfloat16" if torch.cuda.is_available() else "float32")
    task = Task("zorp", None, read_examples(pictures), (), params, seed=0)
    tune(base, task, work, lambda *_: pace())


def _params(setting: Setting, compiled: bool, precision: str) -> TrainParams:
    """The example's: no priors, its four layers of each attention, and nothing that its defaults do not do."""
    from lora_pipeline.params import load_params

    params = load_params(Path(__file__).parents[1] / "params.yaml").concepts["sticker"].train
    engine = {"precision": precision, "compile": compiled}
    adapter = {
        "rank": setting.rank, "alpha": float(setting.rank),
        "unet_targets": ["*attn*.to_q", "*attn*.to_k", "*attn*.to_v", "*attn*.to_out.0"],
    }  # fmt: skip
    return params.model_copy(
        update={
            "method": "lora", "batch_size": setting.batch, "checkpoint_every": 10**9,
            "tuning": params.tuning.model_copy(update={"steps": 10**6, "learning_rate": 1e-4}),
            "adapter": params.adapter.model_copy(update=adapter),
            "engine": params.engine.model_copy(update=engine),
            "prior": params.prior.model_copy(update={"weight": 0.0}),
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Of one side: seconds a step in each round, and MB at the peak."""

    times: Sequence[float]
    peak: float


def measured(setting: Setting, sides: Sequence[str]) -> dict[str, Measured]:
    """Lets the sides of a comparison take turns."""
    from benchmarks import bases

    context = get_context("spawn")
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        bases.make_pictures(folder / "pictures", bases.pixels_of(setting.base))
        ends: dict[str, Connection] = {}
        for side in sides:  # one after the other: they are ready to go when all have warmed up
            ends[side], theirs = context.Pipe()
            context.Process(target=compete, args=(setting, side, folder, theirs), daemon=True).start()
            theirs.close()
            ends[side].recv()
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(setting.rounds):
            for side, end in ends.items():
                end.send(setting.steps)
                times[side].append(end.recv() / setting.steps)
        found = {}
        for side, end in ends.items():
            end.send(0)
            found[side] = Measured(times[side], end.recv())
    return found


def rows_of(setting: Setting) -> list[Row]:
    """Ours, plain and compiled, against the example as shipped and with all that it can cache."""
    mine = [OURS, COMPILED] if COMPILED in setting.targets else [OURS]
    found = measured(setting, [*PEERS, *mine])
    rows = []
    for side in mine:
        for peer in PEERS:
            ours, theirs = found[side], found[peer]
            ratio = min(theirs.times) / min(ours.times)
            medians = [1.0 / statistics.median(each.times) for each in (ours, theirs)]
            target = setting.targets.get(side) if peer == SHIPPED else None
            what = f"{setting.base}, batch {setting.batch}, {side} against {peer}"
            speed = (
                f"{what}: steps/s of the fastest of {setting.rounds} rounds; medians {medians[0]:.4g}, {medians[1]:.4g}"
            )
            met = None if target is None else ratio >= target
            rows.append(Row(speed, 1.0 / min(ours.times), 1.0 / min(theirs.times), ratio, target, met))
            rows.append(Row(f"{what}: MB at the peak", ours.peak, theirs.peak, theirs.peak / ours.peak, None, None))
    return rows


def share_row(setting: Setting, steps_a_second: float) -> Row:
    """What the steps' multiplications are of the GPU's measured rate for bfloat16 matrices, in TFLOP/s."""
    from benchmarks import rate

    reached, possible = (
        steps_a_second * rate.of_step(setting.base, setting.batch, setting.rank) / 1e12,
        rate.of_matrices() / 1e12,
    )
    what = f"{setting.base}, batch {setting.batch}: TFLOP/s of ours, of bfloat16 matrices alone, and the share"
    return Row(what, reached, possible, reached / possible, None, None)


def rows() -> list[Row]:
    """The rows of this benchmark."""
    import torch

    if not torch.cuda.is_available():
        return [row for setting in ON_CPU for row in rows_of(setting)]
    found = []
    for setting in ON_GPU:
        mine = rows_of(setting)
        found += [*mine, share_row(setting, max(row.ours for row in mine if "steps/s" in row.what))]
    return found


if __name__ == "__main__":
    show(rows(), sys.argv)
