from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_pipeline.errors import PipelineError, UsageError
from lora_pipeline.params import Params
from lora_pipeline.params.defaults import with_defaults
from stages import app
from stages.check import folders

CommandLine = Callable[..., int]
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from stages.app import main; main()"]


def lora_pipe(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LORA_PIPE_TRACKING": "off"}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str) -> int:
    """The exit code of a command that raises `error`."""

    def fail(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(app, "dispatch", fail)
    monkeypatch.setattr(sys, "argv", ["lora-pipe", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_help_lists_every_command_in_one_line(tmp_path: Path) -> None:
    done = lora_pipe("--help", folder=tmp_path)
    assert done.returncode == 0
    for verb, words in app.VERBS.items():
        assert re.search(rf"^ +{verb} +{re.escape(words)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("verb", ["check", "compose", "convert"])
def test_a_commands_help_has_three_examples(
    verb: str, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(verb, "--help") == 0
    examples = capsys.readouterr().out.partition("Examples:")[2]
    assert len(re.findall(r"^ *(lora-pipe|dvc) ", examples, re.MULTILINE)) == 3


@pytest.mark.parametrize("verb", ["score"])
def test_the_commands_of_base_have_help(
    verb: str, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("base", verb, "--help") == 0
    assert "Examples:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("trian",), ("base", "trian")])
def test_a_misspelt_command_is_told_the_right_one(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = lora_pipe(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: trian: there is no such command\nfix: use train\n"


def test_an_unknown_option_is_a_usage_error(command_line: CommandLine) -> None:
    assert command_line("check", "--nonsense") == 2


def test_an_error_is_two_lines_and_its_code(tmp_path: Path) -> None:
    done = lora_pipe("check", folder=tmp_path)
    assert done.returncode == 4
    assert re.fullmatch(r"error: params\.yaml: .+\nfix: .+\n", done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize("key", ["base", "concepts.zorp.images", "renders.schedule.evaluate.judge"])
def test_check_names_the_folder_that_is_not_there(
    key: str, tmp_path: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    document = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    for name in folders(Params.model_validate(with_defaults(document))).values():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document), "utf-8")
    assert command_line("check") == 0
    *way, last = key.split(".")
    section = document
    for part in way:
        section = section[part]
    section[last] = "nowhere"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document), "utf-8")
    assert command_line("check") == 4
    assert capsys.readouterr().err.startswith(f"error: params.yaml: {key}: there is no folder nowhere\nfix: ")


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"IN4": 0.5}, "'IN4', which is no block"), ([1.0, 0.5], "has 2 numbers"), ({"IN04": 0.5, "*attn2*": 0.0}, None)],
)
def test_check_knows_blocks(
    weights: Any, said: str | None, tmp_path: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    document = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    for name in folders(Params.model_validate(with_defaults(document))).values():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    document["blends"]["zorp-sticker"]["block_weights"] = {"zorp": weights}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document), "utf-8")
    assert command_line("check") == (0 if said is None else 3)
    assert (said or "") in capsys.readouterr().err


def test_debug_shows_the_traceback_too(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("--debug", "check") == 4
    assert "Traceback" in capsys.readouterr().err


def test_user_text_is_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing(monkeypatch, UsageError("[bold]x[/bold]", "[/]", "[red]")) == 2
    assert capsys.readouterr().err == "error: [bold]x[/bold]: [/]\nfix: [red]\n"


@pytest.mark.parametrize("kind", PipelineError.__subclasses__())
def test_every_kind_of_error_has_a_code_of_its_own(kind: type[PipelineError], monkeypatch: pytest.MonkeyPatch) -> None:
    documented = {"UsageError": 2, "ParamsError": 3, "MissingError": 4, "CorruptError": 5, "ResourceError": 6}
    documented |= {"BusyError": 7, "Stopped": 130}
    error = kind(signal.SIGINT) if kind.__name__ == "Stopped" else kind("where", "problem", "fix")  # type: ignore[call-arg,arg-type]
    assert failing(monkeypatch, error) == documented[kind.__name__]


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x.safetensors"),
        MemoryError(),
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_running_out_is_a_resource_error(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing(monkeypatch, error) == 6


def test_a_bug_leaves_a_log_that_the_message_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert failing(monkeypatch, ZeroDivisionError("oops")) == 1
    told = capsys.readouterr().err
    log = re.search(r"\S+\.log", told)
    assert log is not None
    assert "ZeroDivisionError: oops" in Path(log.group()).read_text()
    assert "Traceback" not in told


def test_a_bug_where_no_log_can_be_written_is_told_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(app, "LOG", tmp_path / "file" / "error.log")
    assert failing(monkeypatch, ZeroDivisionError("x")) == 1
    assert capsys.readouterr().err.endswith("fix: report it with what --debug prints\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_code(number: signal.Signals, code: int, tmp_path: Path) -> None:
    script = """
import time
from stages import app
def wait(_):
    print("ready", flush=True)
    time.sleep(60)
app.dispatch = wait
app.main()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, told = process.communicate(timeout=20)
    assert process.returncode == code
    assert told.startswith("error: stopped")


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -c 'from stages.app import main; main()' --help"
    script = f"{command} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert not done.stderr
