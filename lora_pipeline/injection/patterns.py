"""Values of layers by globs over their paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from lora_pipeline.adapters.targets import root
from lora_pipeline.errors import ParamsError

T = TypeVar("T")


def by_target(prefix: str, targets: Iterable[str], default: T, patterns: Mapping[str, T]) -> dict[str, T]:
    """Each target's value: that of the last glob that matches its path below the model, else `default`."""
    start, last_first = len(root(prefix)), [*patterns.items()][::-1]
    return {
        target: next((value for glob, value in last_first if fnmatchcase(target[start:], glob)), default)
        for target in targets
    }


def check_patterns(key: str, patterns: Iterable[str], targets: Mapping[str, Sequence[str]]) -> None:
    """Refuses a glob that matches no layer.

    Args:
        key: Of params.yaml, for the error.
        patterns: Globs.
        targets: By the models' prefixes.

    Raises:
        ParamsError: There is one.
    """
    paths = [target[len(root(prefix)) :] for prefix, some in targets.items() for target in some]
    for glob in patterns:
        if not any(fnmatchcase(path, glob) for path in paths):
            example = paths[len(paths) // 2] if paths else "none"
            raise ParamsError(key, f"{glob!r} matches no layer that is adapted", f"use names like {example!r}")
