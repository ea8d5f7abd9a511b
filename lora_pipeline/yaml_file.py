"""YAML as DVC reads it: numbers and booleans of YAML 1.2, duplicate keys refused, no tags.

PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false and `0o17` is text; DVC follows 1.2. A value on which the
two disagree would be tracked as one thing and used as another.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lora_pipeline.errors import MissingError, ParamsError

LARGEST_BYTES = 1_000_000

INTEGER = re.compile(r"^[-+]?[0-9]+$")
OCTAL_OR_HEX = re.compile(r"^0o[0-7]+$|^0x[0-9a-fA-F]+$")
FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
BOOLEAN = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
NULL = re.compile(r"^(~|null|Null|NULL|)$")


class CoreLoader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own interface

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, with its keys checked to be plain and different."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise ParamsError(location(key_node), "a key must be a word or a number", "write a plain key")
            if key in seen:
                raise ParamsError(location(key_node), f"the key {key!r} stands twice", "keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


def location(node: yaml.Node) -> str:
    """File and line of a node."""
    return f"{Path(node.start_mark.name).name}:{node.start_mark.line + 1}"


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if OCTAL_OR_HEX.match(text) else int(text)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _boolean(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    return str(loader.construct_scalar(node)).lower() == "true"


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", BOOLEAN, list("tTfF")),
    ("tag:yaml.org,2002:int", INTEGER, list("-+0123456789")),
    ("tag:yaml.org,2002:int", OCTAL_OR_HEX, ["0"]),
    ("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789")),
):
    CoreLoader.add_implicit_resolver(_tag, _pattern, _first)
CoreLoader.add_constructor("tag:yaml.org,2002:int", _integer)
CoreLoader.add_constructor("tag:yaml.org,2002:float", _float)
CoreLoader.add_constructor("tag:yaml.org,2002:bool", _boolean)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`.

    Raises:
        MissingError: There is no such file.
        ParamsError: It is too large, not YAML, not a mapping, or names a key twice.
    """
    where = path.name
    if not path.is_file():
        raise MissingError(where, "there is no such file", "run the command in the folder that holds it")
    if path.stat().st_size > LARGEST_BYTES:
        raise ParamsError(where, f"is larger than {LARGEST_BYTES} bytes", "keep only parameters in it")
    try:
        with path.open(encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=CoreLoader)
    except UnicodeDecodeError as error:
        raise ParamsError(where, "is not UTF-8 text", "save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is nested too deeply"
        raise ParamsError(f"{where}{line}", str(problem), "mend the YAML there") from error
    if not isinstance(content, dict):
        raise ParamsError(where, "expected `key: value` lines at the top", "see params.yaml of the sample project")
    return content
