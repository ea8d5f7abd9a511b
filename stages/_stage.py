"""What every stage does around its work: lock, build aside, track, show progress, put in place."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_pipeline.errors import ParamsError
from lora_pipeline.keeping import die_with_parent, file_digest, kept
from lora_pipeline.params import suggestion
from lora_pipeline.tracking import Tracker, track
from lora_pipeline.yaml_file import read_yaml

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
LINE_SECONDS = 5.0  # between plain progress lines

T = TypeVar("T")
Advance = Callable[[int], None]


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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def lines(total: int, label: str) -> Iterator[Advance]:
    told = time.monotonic()

    def advance(done: int) -> None:
        nonlocal told
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)  # noqa: T201 - progress is what it is for

    yield advance


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
) -> Iterator[Stage]:  # fmt: skip
    """Run the work of `verb@instance` inside the block.

    Args:
        verb: The stage.
        instance: The concept, blend or set, or what a run by hand writes.
        out: What is written; it appears when the block ends well.
        inputs: Files and folders that are read.
        section: Reads everything of params.yaml that the work depends on; asked again at the end.
    """
    if "DVC_ROOT" in os.environ:  # by hand, a run may outlive its terminal
        die_with_parent()
    outs = (out,) if isinstance(out, Path) else tuple(out)
    root, name = project_root(), f"{verb}@{instance}"
    with kept(name, outs, [*inputs, *code(verb)], section, root) as keep, track(verb, instance, root) as tracker:
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
