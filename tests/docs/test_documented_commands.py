"""Every command that the README, the docs and the help texts show is one the command line understands."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from stages.app import BASE_VERBS, VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


def function_of(name: str) -> object:
    verb, _, inner = name.partition(" ")
    module = importlib.import_module(f"stages.{verb}")
    return getattr(module, f"base_{inner}" if inner else verb)


def names() -> list[str]:
    return [*(verb for verb in VERBS if verb != "base"), *(f"base {verb}" for verb in BASE_VERBS)]


def documented() -> list[str]:
    blocks = [block for page in PAGES for block in FENCE.findall(page.read_text(encoding="utf-8"))]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    helps = [line.strip() for name in names() for line in (function_of(name).__doc__ or "").splitlines()]
    commands = [part.strip() for line in (*lines, *helps) for part in line.split("&&")]
    return sorted({command for command in commands if command.startswith("lora-pipe ")})


def test_there_are_commands_to_check() -> None:
    assert len(documented()) >= 30


@pytest.mark.parametrize("name", names())
def test_help_shows_three_examples(name: str) -> None:
    text = function_of(name).__doc__ or ""
    assert len(re.findall(r"^\s+(?:lora-pipe|dvc) ", text, re.MULTILINE)) == 3


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_parses(command: str) -> None:
    _, *words = shlex.split(command)
    if words[0].startswith("-"):
        return  # lora-pipe --help
    name = " ".join(words[:2]) if words[0] == "base" else words[0]
    app = typer.Typer(add_completion=False)
    app.command()(function_of(name))  # type: ignore[type-var]
    rest = words[len(name.split()) :]
    if "--help" not in rest:
        typer.main.get_command(app).make_context(name, rest).close()
