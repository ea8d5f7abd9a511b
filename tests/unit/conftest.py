"""The command line in this process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages import app

CommandLine = Callable[..., int]


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Runs `lora-pipe` with arguments in `tmp_path`, untracked, and gives its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PIPE_TRACKING", "off")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lora-pipe", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run
