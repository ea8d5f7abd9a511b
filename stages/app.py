"""The `lora-pipe` command: it gathers the verbs without loading them, and turns errors into words and exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from lora_pipeline.errors import PipelineError, ResourceError, Stopped

# Verb: what `lora-pipe --help` says of it. The verb's module is stages/<verb>.py and its function has its name.
VERBS = {
    "check": "Check params.yaml.",
    "preprocess": "Raw pictures → squares with captions.",
    "priors": "Class pictures, drawn by the base.",
    "train": "Learn a concept from its pictures.",
    "extract": "A training run's result → a portable adapter.",
    "compose": "Several adapters → one.",
    "merge": "Adapters into a copy of the base.",
    "render": "Pictures from prompts, with adapters and schedules.",
    "evaluate": "Score a set of pictures.",
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


class LazyGroup(click.Group):
    """A group that knows its verbs' one-line help and loads a verb's module when it is called."""

    def __init__(self, verbs: dict[str, str], load: Callable[[str], click.Command], **options: Any) -> None:
        super().__init__(**options)
        self.verbs = verbs
        self.load = load

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        return self.load(cmd_name) if cmd_name in self.verbs else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(self.verbs.items()))


def command(module: str, function: str, name: str) -> click.Command:
    """The typer function `function` of `stages.<module>` as a click command."""
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name)(getattr(importlib.import_module(f"stages.{module}"), function))
    return typer.main.get_command(app)


def verb(name: str) -> click.Command:
    if name == "base":
        load: Callable[[str], click.Command] = lambda inner: command("base", f"base_{inner}", inner)  # noqa: E731
        return LazyGroup(BASE_VERBS, load, name=name, help=VERBS[name])
    return command(name, name, name)


app = LazyGroup(
    VERBS,
    verb,
    name="lora-pipe",
    params=[click.Option(["--debug"], is_flag=True, help="Show the traceback of an error.")],
    help="""Personalise Stable Diffusion by reproducible stages. `dvc repro` runs them all; each runs alone, too.

\b
  lora-pipe check
  lora-pipe compose zorp.safetensors=0.7 sticker.safetensors=0.5 --out both.safetensors
  lora-pipe inspect both.safetensors
""",
)


def main() -> NoReturn:
    """Run the command line; ends the process with a documented exit code."""
    debug = "--debug" in sys.argv
    # `--debug` is welcome anywhere on the line.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, stop)
    try:
        app.main(args=arguments, prog_name="lora-pipe", standalone_mode=False)
        code = 0
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except BaseException as error:  # noqa: BLE001 - the last place an error can go
        if debug:
            traceback.print_exc()
        code = told(error)
    sys.stdout.flush()
    sys.exit(code)


def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the interface of signal handlers
    raise Stopped(number)


def told(error: BaseException) -> int:
    """Say on stderr what is wrong and what to do; returns the exit code."""
    known = recognised(error)
    if known is None:
        LOG.parent.mkdir(parents=True, exist_ok=True)
        LOG.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        print(f"error: lora-pipe: a bug of ours: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        print(f"fix: report it with {LOG}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"error: {known.where}: {known.problem}", file=sys.stderr)  # noqa: T201
    print(f"fix: {known.fix}", file=sys.stderr)  # noqa: T201
    return known.exit_code


def recognised(error: BaseException) -> PipelineError | None:
    """What the error means to a user, or None where it means nothing to them."""
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return Stopped(signal.SIGINT)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(str(error.filename or os.getcwd()), "no space is left on the disk", "free some and rerun")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return ResourceError(str(error.filename), "may not be written or read", "change its permissions")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ResourceError("memory", "ran out", "lower batch_size or resolution")
    return None
