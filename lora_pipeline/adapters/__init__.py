"""Adapters: what they are, how they are stored, combined and merged. Pure tensors and names.

The imports wait inside the functions so that `lora-pipe inspect` reads headers without loading torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Adapter


def load_adapter(path: Path, *, allow_pickle: bool = False) -> Adapter:
    """Reads an adapter of any known format, recognised by its header.

    Args:
        path: The file.
        allow_pickle: Whether `.pt`, `.bin` and `.ckpt` files may be opened, by torch's weights-only reader.

    Raises:
        MissingError: No such file.
        CorruptError: The file is damaged, unsafe, or no adapter; the error names the file and the key.
    """
    from lora_pipeline.adapters import formats

    return formats.load(path, allow_pickle=allow_pickle)


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Writes an adapter in the native format: same adapter, same bytes; whole or not at all.

    Raises:
        ResourceError: No space left.
    """
    from lora_pipeline.adapters import formats

    formats.save(adapter, path)
