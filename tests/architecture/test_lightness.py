"""What a command loads is what its user waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "mlflow", "numpy", "PIL"}


def loaded(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has after `statement`."""
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    return set(done.stderr.split())


def test_help_loads_nothing_it_does_not_print() -> None:
    assert not loaded("import stages.app; stages.app.dispatch(['--help'])") & (HEAVY | {"typer", "pydantic", "yaml"})


def test_check_needs_no_tensors() -> None:
    assert not loaded("from stages.check import check; from pathlib import Path; check(Path('params.yaml'))") & HEAVY


@pytest.mark.parametrize("verb", ["preprocess", "priors", "train", "extract", "compose", "merge", "render", "evaluate"])
def test_the_help_of_a_stage_loads_no_tensors(verb: str) -> None:
    script = f"import stages.app\ntry:\n    stages.app.dispatch(['{verb}', '--help'])\nexcept SystemExit:\n    pass"
    assert not loaded(script) & HEAVY


@pytest.mark.parametrize("room", ["adapters", "injection", "data"])
def test_the_light_rooms_do_not_reach_diffusers(room: str) -> None:
    """Import by import, where the contracts of import-linter look at our own files only."""
    names = sorted(f"lora_pipeline.{room}.{path.stem}" for path in (ROOT / "lora_pipeline" / room).glob("[!_]*.py"))
    assert not loaded(f"import {', '.join(names)}") & {"diffusers", "transformers", "mlflow", "peft"}


@pytest.mark.parametrize("verb", ["extract", "compose", "merge", "inspect", "check", "preprocess"])
def test_light_stages_do_not_reach_diffusers(verb: str) -> None:
    """With everything that the stage imports inside its functions, but for learning a blend's weights on a base."""
    import grimp

    graph = grimp.build_graph("lora_pipeline", "stages", include_external_packages=True, cache_dir=None)
    graph.remove_module("stages._fit")
    reached = graph.find_upstream_modules(f"stages.{verb}")
    assert not reached & {"diffusers", "transformers"}
    tellers = {module for module in reached if "mlflow" in graph.find_modules_directly_imported_by(module)}
    assert tellers <= {"lora_pipeline.tracking.store"}


def test_a_plain_blend_reaches_no_base() -> None:
    assert not loaded("import stages.compose, stages._fit") & {"diffusers", "transformers", "torch"}
