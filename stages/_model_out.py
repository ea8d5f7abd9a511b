"""Where a full model may be written."""

from __future__ import annotations

from pathlib import Path

from lora_pipeline.errors import UsageError


def check_replaceable(out: Path) -> None:
    """Refuses to put a model in the place of a folder that is none.

    Raises:
        UsageError: `out` is a folder with something else in it.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").is_file():
        raise UsageError(str(out), "is a folder that holds something else", f"write to {out / 'model'}")
