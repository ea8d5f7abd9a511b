"""The `lora-pipe` command: it gathers the verbs without loading them, and turns errors into words and exit codes."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lora_pipeline.errors import PipelineError, ResourceError, Stopped, UsageError, printable

# Verb: what `lora-pipe --help` says of it. The verb's module is stages/<verb>.py and its function has its name.
VERBS = {
    "check": "Check params.yaml.",
    "preprocess": "Raw pictures → squares with captions.",
    "priors": "Class pictures, drawn by the base.",
    "train": "Learn a concept from its pictures.",
    "extract": "A run, a tuned model or a larger adapter → a portable adapter.",
    "compose": "Several adapters → one.",
    "merge": "Adapters into a copy of the base.",
    "render": "Pictures from prompts, with adapters and schedules.",
    "evaluate": "Score a set of pictures.",
    "convert": "An adapter in another program's format.",
    "inspect": "Show what an adapter is and where it comes from.",
    "study": "Measure the methods over subjects and seeds.",
    "base": "Train, judge and score the embedded base.",
}
BASE_VERBS = {
    "train": "Train the embedded base from seeds.",
    "judge": "Train the judge of toy pictures.",
    "score": "How often the base paints what it is told.",
}
LOG = Path(".work/error.log")
CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch's words; on a GPU it has a class for it


INTRODUCTION = """\
Personalise Stable Diffusion by reproducible stages. `dvc repro` runs them all; each runs alone, too.

  lora-pipe check
  lora-pipe compose zorp.safetensors=0.7 sticker.safetensors=0.5 --out both.safetensors
  lora-pipe inspect both.safetensors
"""


def listing(group: str, introduction: str, verbs: dict[str, str]) -> str:
    """The help of a group of commands, told without loading any of them."""
    lines = [f"Usage: {group} COMMAND [OPTIONS]", "", introduction, "Commands:"]
    lines += [f"  {name:<12}{words}" for name, words in verbs.items()]
    lines += ["", f"`{group} COMMAND --help` shows a command's options and examples; --debug its tracebacks."]
    return "\n".join(lines)


def run(module: str, function: str, name: str, arguments: list[str]) -> None:
    """Call the typer function `function` of `stages.<module>` with `arguments`."""
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(getattr(importlib.import_module(f"stages.{module}"), function))
    app(args=arguments, prog_name=f"lora-pipe {name}")


def dispatch(arguments: list[str]) -> None:
    """Run the command that `arguments` name, or show help.

    Raises:
        UsageError: There is no such command.
    """
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb == "base" and (not rest or rest[0] in BASE_VERBS or rest[0] == "--help"):
        if rest and rest[0] in BASE_VERBS:
            run("base", f"base_{rest[0]}", f"base {rest[0]}", rest[1:])
        else:
            show(listing("lora-pipe base", VERBS["base"] + "\n", BASE_VERBS))
    elif verb in VERBS and verb != "base":
        run(verb, verb, verb, rest)
    elif verb in ("--help", "-h"):
        show(listing("lora-pipe", INTRODUCTION, VERBS))
    else:
        unknown = rest[0] if verb == "base" else verb
        near = difflib.get_close_matches(unknown, BASE_VERBS if verb == "base" else VERBS, n=1)
        raise UsageError(unknown, "there is no such command", f"use {near[0]}" if near else "see lora-pipe --help")


def show(text: str) -> None:
    """Write `text` to standard output."""
    sys.stdout.write(text + "\n")


def main() -> NoReturn:
    """Run the command line; ends the process with a documented exit code."""
    # `--debug` is welcome anywhere on the line.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        dispatch(arguments)
        sys.stdout.flush()
        code = 0
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException as error:  # noqa: BLE001 - the last place an error can go
        if "--debug" in sys.argv:
            traceback.print_exc()
        code = told(error)
    sys.stdout.flush()
    sys.exit(code)


def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the interface of signal handlers
    """End the command as a signal asks."""
    raise Stopped(number)


def told(error: BaseException) -> int:
    """Say on stderr what is wrong and what to do; returns the exit code."""
    known = recognised(error)
    if known is None:
        words = (
            f"error: lora-pipe: a bug of ours: {type(error).__name__}: {error}\nfix: report it with {logged(error)}\n"
        )
    else:
        words = f"error: {printable(str(known))}\nfix: {printable(known.fix)}\n"
    sys.stderr.write(words)
    return known.exit_code if known else 1


def logged(error: BaseException) -> str:
    """Where the error's traceback can be seen."""
    try:
        LOG.parent.mkdir(parents=True, exist_ok=True)
        LOG.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return "what --debug prints"
    return str(LOG)


def recognised(error: BaseException) -> PipelineError | None:
    """What the error means to a user, or None where it means nothing to them."""
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(str(error.filename or Path.cwd()), "no space is left on the disk", "free some and rerun")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return ResourceError(str(error.filename), "may not be written or read", "change its permissions")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or CPU_MEMORY in str(error):
        return ResourceError("memory", "ran out", "lower batch_size or resolution")
    return None
