"""What is wrong with params.yaml, in its user's terms."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lora_pipeline.errors import ParamsError

# Of several faults reported for one value, these say most.
TELLING = ("extra_forbidden", "value_error")


def suggestion(name: object, known: Any) -> str:
    """What to write instead of the unknown `name`."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"write {near[0]!r}" if near else f"use one of {', '.join(sorted(map(str, known))) or 'nothing'}"


def explained(
    path: Path, error: ValidationError, root: type[BaseModel], origin: Callable[[list[str]], list[str]]
) -> ParamsError:
    """The fault of `error` that says most, as what a user would have to change.

    Args:
        path: Of params.yaml.
        error: What pydantic found.
        root: The model of the whole file, whose keys are suggested.
        origin: Where in the file the value at some keys stands.
    """
    # A wrong branch of a union is reported beside the right one; the fault deepest in the file is the user's.
    fault = max(error.errors(), key=lambda e: (e["type"] in TELLING, len(_keys(e["loc"]))))
    keys = _keys(fault["loc"])
    where = f"{path.name}: {'.'.join(origin(keys))}" if keys else path.name
    if fault["type"] == "extra_forbidden":
        return ParamsError(where, "there is no such key", suggestion(keys[-1], _siblings(root, keys[:-1])))
    if fault["type"] == "missing":
        return ParamsError(where, "is missing", f"add `{keys[-1]}:` there")
    problem = fault["msg"].removeprefix("Value error, ")
    found = fault["input"]
    if fault["type"] == "literal_error":
        return ParamsError(where, f"{_lower(problem)}, found {found!r}", suggestion(found, _quoted(problem)))
    if isinstance(found, dict | list) and fault["type"] == "value_error":
        return ParamsError(where, problem, f"edit {where}")
    return ParamsError(where, f"{_lower(problem)}, found {found!r}", f"edit {where}")


def _quoted(text: str) -> list[str]:
    return re.findall("'([^']*)'", text)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the file in pydantic's location, without the names of the validators it went through."""
    inner = re.compile(r"[\[\](]|^(float|list|tuple|int|constrained-int|str|none)$")
    return [str(part) for part in loc if not (isinstance(part, str) and inner.search(part))]


def _siblings(model: type[BaseModel], keys: list[str]) -> list[str]:
    """The known keys of the section at `keys`."""
    for key in keys:
        field = model.model_fields.get(key)
        if field is None:
            continue  # the name of a concept, blend, merge or render set
        inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
        model = next((t for t in inner if issubclass(t, BaseModel)), model)
    return list(model.model_fields)
