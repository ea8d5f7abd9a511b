"""dvc.yaml against the code: DVC reruns a stage for what its entry names, so it must name what the stage uses."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

import grimp
import pytest
import typer
import yaml

from lora_pipeline.params.defaults import with_defaults
from lora_pipeline.yaml_file import read_yaml
from stages.app import VERBS

ROOT = Path(__file__).parents[2]
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# What carries a stage rather than making its outs: a change of theirs does not make an out stale.
CARRIERS = {"errors", "params", "keeping", "tracking", "yaml_file", "_stage"}
INSTANCES = {"--concept", "--blend", "--name", "--set"}  # these name a section of params.yaml


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("lora_pipeline", "stages", exclude_type_checking_imports=True, cache_dir=None)


def is_code(dep: str) -> bool:
    return dep.startswith(("stages/", "lora_pipeline/"))


def paths(entries: list[Any]) -> set[str]:
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def options(verb: str) -> dict[str, str]:
    words = shlex.split(STAGES[verb]["do"]["cmd"])
    assert words[:3] == ["exec", "lora-pipe", verb], "a shell in between would survive a killed dvc"
    return dict(zip(words[3::2], words[4::2], strict=True))


def touches(one: str, other: str) -> bool:
    """Whether the paths are the same, or one is inside the other."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


@pytest.mark.parametrize("verb", STAGES)
def test_code_dependencies_are_what_the_stage_imports(verb: str, graph: grimp.ImportGraph) -> None:
    module = f"stages.{verb}"
    closure = graph.find_upstream_modules(module) | {module}
    used = set()
    for package, *rest in (name.split(".") for name in closure):
        if rest and rest[0] not in CARRIERS:
            used.add(f"stages/{rest[0]}.py" if package == "stages" else f"lora_pipeline/{rest[0]}")
    assert {dep for dep in STAGES[verb]["do"]["deps"] if is_code(dep)} == used


@pytest.mark.parametrize("verb", STAGES)
def test_options_are_the_edges_and_nothing_else(verb: str) -> None:
    stage, given = STAGES[verb]["do"], options(verb)
    reads = {dep for dep in stage["deps"] if not is_code(dep) and dep != "requirements.lock"}
    writes = paths(stage.get("outs", []) + stage.get("metrics", []) + stage.get("plots", []))
    out = given.pop("--out")
    assert {Path(path).with_suffix("") for path in writes} == {Path(out).with_suffix("")}
    asked = {value for name, value in given.items() if name not in INSTANCES}
    assert all(any(touches(dep, path) for path in asked) for dep in reads), "a dependency the stage is not told of"
    assert all(any(touches(dep, path) for dep in reads) for path in asked), "a path DVC does not know of"


@pytest.mark.parametrize("verb", STAGES)
def test_the_command_takes_the_options_it_is_given(verb: str) -> None:
    app = typer.Typer()
    app.command()(getattr(importlib.import_module(f"stages.{verb}"), verb))
    known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert set(options(verb)) <= known


@pytest.mark.parametrize("verb", STAGES)
def test_no_hyper_parameter_stands_in_a_command_line(verb: str) -> None:
    """A prompt in a command line is one apostrophe from breaking the shell, and reruns more than it must."""
    numbers = [value for value in options(verb).values() if value.replace(".", "").isdigit()]
    assert not numbers
    assert "prompt" not in STAGES[verb]["do"]["cmd"]


@pytest.mark.parametrize("verb", STAGES)
def test_tracked_params_exist(verb: str) -> None:
    """DVC takes a misspelt key of `params` for one that is not set yet."""
    content = read_yaml(ROOT / "params.yaml")
    params = with_defaults(content) | {"defaults": content["defaults"]}
    section = STAGES[verb]["foreach"].strip("${}")
    for name in params[section]:
        for path in STAGES[verb]["do"]["params"]:
            value: Any = params
            for key in path.replace("${key}", name).split("."):
                assert key in value, path
                value = value[key]


def test_every_stage_is_a_command() -> None:
    assert set(STAGES) <= set(VERBS)
