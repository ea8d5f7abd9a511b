"""What every stage does around its work: lock, build aside, track, show progress, put in place."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

from lora_pipeline.errors import ParamsError
from lora_pipeline.keeping import die_with_parent, file_digest, kept
from lora_pipeline.params import suggestion
from lora_pipeline.tracking import Tracker, track
from lora_pipeline.yaml_file import read_yaml

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
LINE_SECONDS = 5.0  # between plain progress lines

T = TypeVar("T")


class Advance(Protocol):
    """Told how much is done, and what else a user likes to see."""

    def __call__(self, done: int, told: str = "") -> None: ...


class Pace:
    """How fast things go, without what was done before the first call."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.start: tuple[float, int] | None = None

    def told(self, done: int) -> str:
        """Such as `3.4/s, 0:01:20 left`; nothing at first."""
        now = time.monotonic()
        if self.start is None:
            self.start = (now, done)
        began, first = self.start
        if done == first or now == began:
            return ""
        rate = (done - first) / (now - began)
        return f"{rate:.3g}/s, {timedelta(seconds=round((self.total - done) / rate))} left"


@dataclass(frozen=True)
class Stage:
    """What a command works with. `outs` are the temporary names to build; `building` is the first."""

    outs: tuple[Path, ...]
    work: Path
    tracker: Tracker

    @property
    def building(self) -> Path:
        return self.outs[0]

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Advance]:
        """A bar on a terminal, a line now and then elsewhere."""
        with bar(total, label) if sys.stderr.isatty() else lines(total, label) as advance:
            yield advance


@contextmanager
def bar(total: int, label: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    pace = Pace(total)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, told="")

        def advance(done: int, told: str = "") -> None:
            progress.update(task, completed=done, told=joined(pace.told(done), told))

        yield advance


@contextmanager
def lines(total: int, label: str) -> Iterator[Advance]:
    last, pace = time.monotonic(), Pace(total)

    def advance(done: int, told: str = "") -> None:
        nonlocal last
        speed = pace.told(done)
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            line = joined(f"{label}: {done} of {total}", speed, told)
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress is what it is for

    yield advance


def joined(*parts: str) -> str:
    """With commas between what is not empty."""
    return ", ".join(part for part in parts if part)


def project_root() -> Path:
    """The folder of the DVC project, where work and tracking are kept; the working folder where there is none."""
    if "DVC_ROOT" in os.environ:  # the main project even inside `dvc exp run --temp`
        return Path(os.environ["DVC_ROOT"])
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def entry(sections: Mapping[str, T], where: str, name: str) -> T:
    """The section `name` of params.yaml's `where`.

    Raises:
        ParamsError: There is none.
    """
    if name not in sections:
        raise ParamsError(f"params.yaml: {where}", f"has no {name!r}", suggestion(name, sections))
    return sections[name]


def code(verb: str) -> list[Path]:
    """The code and library versions that dvc.yaml says the stage is made of; none where there is no dvc.yaml.

    A checkpoint of other code must not be gone on from, and code that changes during a run is recorded wrongly.
    """
    if not PIPELINE.is_file():
        return []
    entry = read_yaml(PIPELINE)["stages"].get(verb, {})
    deps = entry.get("do", entry).get("deps", [])
    return [Path(dep) for dep in deps if dep.startswith(("lora_pipeline/", "stages/")) or dep == "requirements.lock"]


@contextmanager
def stage(
    verb: str, instance: str, *, out: Path | Sequence[Path], inputs: Sequence[Path], section: Callable[[], object],
    lasting: Callable[[], object] | None = None,
) -> Iterator[Stage]:  # fmt: skip
    """Run the work of `verb@instance` inside the block.

    Args:
        verb: The stage.
        instance: The concept, blend or set, or what a run by hand writes.
        out: What is written; it appears when the block ends well.
        inputs: Files and folders that are read.
        section: Reads everything of params.yaml that the work depends on; asked again at the end.
        lasting: See `kept`.
    """
    if "DVC_ROOT" in os.environ:  # by hand, a run may outlive its terminal
        die_with_parent()
    outs = (out,) if isinstance(out, Path) else tuple(out)
    root, name = project_root(), f"{verb}@{instance}"
    with (
        kept(name, outs, [*inputs, *code(verb)], section, root, lasting) as keep,
        track(verb, instance, root) as tracker,
    ):
        tracker.params(flat(section()))
        yield Stage(keep.building, keep.work, tracker)
        for path, final in zip(keep.building, outs, strict=True):
            if path.is_file():
                tracker.tag(f"out.{final.name}", file_digest(path))


def flat(section: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted keys."""
    if not isinstance(section, Mapping):
        return {prefix or "value": section}
    told: dict[str, object] = {}
    for key, value in section.items():
        told |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return told
