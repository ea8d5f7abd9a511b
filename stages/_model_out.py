"""Where a full model may be written."""

from __future__ import annotations

from pathlib import Path

from lora_pipeline.errors import UsageError


def check_replaceable(out: Path, base: Path, single: bool) -> None:
    """Refuses to put a model in the place of what it is made of, or of something that is no model.

    Args:
        out: What is to be written.
        base: What it is made of.
        single: Whether it is to be a single file.

    Raises:
        UsageError: `out` is the base, a file where a folder is to be, or a folder with something else in it.
    """
    if out.exists() and base.exists() and out.samefile(base):
        raise UsageError(str(out), "is the base that is read", "give another name to write to")
    if out.is_file() and not single:
        raise UsageError(str(out), "is a file, where a folder is to be", f"write to {out.with_suffix('')}-model")
    if out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").is_file():
        raise UsageError(str(out), "is a folder that holds something else", f"write to {out / 'model'}")
