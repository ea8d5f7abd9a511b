"""Several processes that train one run together: `torchrun --nproc-per-node 2 --no-python lora-pipe train ...`.

The batches of a step (`optimiser.accumulation`) are dealt out to them, their gradients are summed, and all take the
same step. So the values of params.yaml mean the same for any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
import torch.distributed
from torch import Tensor, nn

from lora_pipeline.errors import ParamsError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """Which of the processes this is; the first alone writes files."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, batches: int) -> range:
        """The numbers of this process's batches among those of a step.

        Raises:
            ParamsError: They cannot be dealt out evenly.
        """
        if batches % self.size:
            problem = f"is {batches}, and {self.size} processes share the batches of a step"
            raise ParamsError("optimiser.accumulation", problem, f"use {self.size} or a multiple of it")
        return range(self.rank, batches, self.size)

    def told(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them."""
        if self.size == 1:
            return make()
        box: list[T | None] = [make() if self.first else None]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every parameter's gradient becomes its sum over the processes; it stays None where none has one."""
        if self.size == 1:
            return
        learning = list(parameters)
        flags = torch.tensor([float(each.grad is not None) for each in learning], device=learning[0].device)
        torch.distributed.all_reduce(flags)
        touched = [each for each, flag in zip(learning, flags.tolist(), strict=True) if flag]
        if not touched:
            return
        flat = torch.cat([_gradient(each).flatten() for each in touched])
        torch.distributed.all_reduce(flat)
        for each, part in zip(touched, flat.split([each.numel() for each in touched]), strict=True):
            each.grad = part.view_as(each).clone()

    def summed(self, value: Tensor) -> Tensor:
        """A tensor's sum over the processes."""
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return value


ALONE = Crew()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def rank() -> int:
    """Which of its launcher's processes this is; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def together() -> Iterator[Crew]:
    """Inside, this process and the others of its launcher (RANK, WORLD_SIZE) are one crew.

    Raises:
        UsageError: The launcher was asked for several processes and started one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        _check_launcher(os.environ)
        yield Crew()
        return
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Crew(rank(), size)
    finally:
        torch.distributed.destroy_process_group()


def _check_launcher(environment: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    if not any(name.startswith("ACCELERATE_") for name in environment):
        return
    try:
        words = [word for parent in psutil.Process().parents()[:2] for word in parent.cmdline()]
    except psutil.Error:
        return
    asked = processes_asked(words)
    if asked > 1:
        problem = f"was asked for {asked} processes and started one, as it does with --cpu"
        raise UsageError("accelerate launch", problem, f"torchrun --nproc-per-node {asked} --no-python lora-pipe ...")


def processes_asked(words: list[str]) -> int:
    """How many processes the command line of `accelerate launch` asks for; 1 where it does not say."""
    for place, word in enumerate(words):
        name, _, value = word.replace("_", "-").partition("=")
        if name == "--num-processes":
            value = value or (words[place + 1] if place + 1 < len(words) else "")
            return int(value) if value.isdigit() else 1
    return 1
