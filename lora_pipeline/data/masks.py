"""Masks: `NAME.mask.png` beside `NAME.png` is white where the concept is and black where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lora_pipeline.data.images import MASK, open_mask
from lora_pipeline.errors import CorruptError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_pipeline.data.dataset import Example


def mask_beside(picture: Path) -> Path | None:
    """The mask of a picture, or None where there is none."""
    path = picture.with_name(f"{picture.stem}{MASK}")
    return path if path.is_file() else None


def mask_for(path: Path, size: tuple[int, int]) -> Image.Image:
    """Reads the mask of a picture of `size` (width, height), as grey.

    Raises:
        MissingError, CorruptError: It cannot be read, or is of another size than the picture.
    """
    mask = open_mask(path)
    if mask.size != size:
        sizes = [f"{width} x {height}" for width, height in (mask.size, size)]
        problem = f"is {sizes[0]}, and its picture {sizes[1]}"
        raise CorruptError(str(path), problem, "make it of the picture's size, or take it out")
    return mask


def check_mask(path: Path, mask: Image.Image) -> None:
    """Refuses a mask that leaves nothing to learn.

    Raises:
        CorruptError: It is black everywhere.
    """
    if mask.getbbox() is None:
        problem = "is black everywhere in the part of the picture that is learnt"
        raise CorruptError(str(path), problem, "paint the concept white in it, or take it out")


def load_masks(examples: Sequence[Example], size: tuple[int, int]) -> Tensor:
    """The examples' masks, (n, 1, height, width) float32 in [0, 1]; 1 everywhere for those without.

    Args:
        examples: Pictures of one size.
        size: That size, (width, height).

    Raises:
        MissingError, CorruptError: A mask cannot be read, is of another size, or black everywhere.
    """
    import numpy as np
    import torch

    masks = [Image.new("L", size, "white") if each.mask is None else mask_for(each.mask, size) for each in examples]
    for example, mask in zip(examples, masks, strict=True):
        if example.mask is not None:
            check_mask(example.mask, mask)
    return torch.from_numpy(np.stack([np.asarray(mask) for mask in masks])).unsqueeze(1).float() / 255.0
