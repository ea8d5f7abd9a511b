"""Errors are part of the interface: where it happened, what is wrong, what to do, and an exit code.

    PipelineError
    ├── UsageError      2    the command line contradicts itself
    ├── ParamsError     3    a value in params.yaml cannot be
    ├── MissingError    4    a file, folder or model is not there
    ├── CorruptError    5    a file is damaged, unsafe or of another kind than asked for
    ├── ResourceError   6    disk or memory ran out
    ├── BusyError       7    another process works on the same out
    └── Stopped  130/143     stopped by a signal, with its state saved

Anything else that escapes is a bug of ours and ends with exit code 1.
"""

from __future__ import annotations

from typing import ClassVar


class PipelineError(Exception):
    """An error a user can act on.

    Args:
        where: The file, key or option at fault.
        problem: What was expected and what was found.
        fix: One command or edit that helps.
    """

    code: ClassVar[int] = 1

    def __init__(self, where: str, problem: str, fix: str) -> None:
        super().__init__(where, problem, fix)
        self.where = where
        self.problem = problem
        self.fix = fix

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return self.code

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def printable(text: str) -> str:
    """Text of a file, on one line and without what a terminal would obey: such letters are escaped as Python does."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class UsageError(PipelineError):
    """The command line contradicts itself."""

    code = 2


class ParamsError(PipelineError):
    """A value in params.yaml cannot be."""

    code = 3


class MissingError(PipelineError):
    """A file, folder or model is not there."""

    code = 4


class CorruptError(PipelineError):
    """A file is damaged, unsafe or of another kind than asked for."""

    code = 5


class ResourceError(PipelineError):
    """Disk or memory ran out."""

    code = 6


class BusyError(PipelineError):
    """Another process works on the same out."""

    code = 7


class Stopped(PipelineError):
    """Stopped by a signal; what was checkpointed is kept."""

    def __init__(self, signal: int) -> None:
        super().__init__("stopped", f"by signal {signal}; the state is saved", "run the same command again to go on")
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """128 and the signal, as shells have it."""
        return 128 + self.signal
