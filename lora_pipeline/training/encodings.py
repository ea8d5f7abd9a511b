"""Pictures as the UNet knows them, each encoded once: upright and, where it is to be mirrored, mirrored."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.data.dataset import Example, load_pixels, size_of
from lora_pipeline.data.masks import load_masks
from lora_pipeline.pretrained.latents import encode_images
from lora_pipeline.training.cache import TensorCache, fingerprint, key_of
from lora_pipeline.training.masking import pixel_weights

_PICTURES_AT_ONCE = 8
_PATIENCE = 2.0  # seconds before a user is told what takes long


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """An example as the UNet knows it.

    Args:
        caption: What the picture shows.
        mean: (channels, height, width), of the latents' distribution.
        deviation: Shaped as the mean; every visit draws afresh, as the encoder's own noise is part of the data.
        pixel_weights: (1, height, width), or None for 1 everywhere; see `masking.pixel_weights`.
        repeats: How often it comes where others come once.
        mirrored: The same seen in a mirror, for half of the visits; None where it is never mirrored.
        picture: (3, height, width) in [-1, 1], for bases that inpaint, which are given parts of it; None for others.
    """

    caption: str
    mean: Tensor
    deviation: Tensor
    pixel_weights: Tensor | None = None
    repeats: int = 1
    mirrored: EncodedExample | None = None
    picture: Tensor | None = None


class Encoder:
    """An autoencoder that remembers what it encoded.

    Args:
        vae: The base's.
        cache: What was encoded before.
        say: Told how far it is when it takes long.
        background: What lies outside masks weighs, in [0, 1]; None pays no heed to masks.
        keep: Whether examples hold their pictures too.
    """

    def __init__(
        self,
        vae: Any,
        cache: TensorCache,
        say: Callable[[str], None],
        background: float | None = None,
        keep: bool = False,
    ) -> None:
        self.vae = vae
        self.keep = keep
        self.background = background
        self.cache = cache
        self.fingerprint = "" if cache.folder is None else fingerprint(vae)
        self.say = say

    def examples(self, examples: Sequence[Example], flip: bool = False) -> list[EncodedExample]:
        """Encodes pictures of any sizes; mirrored latents are not those of the mirrored picture, which is encoded too.

        Args:
            examples: Pictures with captions.
            flip: Whether they are to be mirrored too.

        Raises:
            CorruptError: A picture cannot be read, or a side is no multiple of 8.
        """
        upright = self._oriented(examples, mirrored=False)
        if not flip:
            return upright
        mirrored = self._oriented(examples, mirrored=True)
        return [replace(each, mirrored=other) for each, other in zip(upright, mirrored, strict=True)]

    def _oriented(self, examples: Sequence[Example], mirrored: bool) -> list[EncodedExample]:
        """Chunks are encoded and remembered whole: rounding may depend on what an encoder is given at once."""
        found: dict[int, EncodedExample] = {}
        known, start, patience = 0, time.monotonic(), _PATIENCE
        for chunk in _chunks(examples):
            some = [examples[index] for index in chunk]
            pixels = load_pixels(some, mirrored)
            tensors, was_known = self._encoded(pixels)
            weights = self._weights(some, tensors["mean"].shape, mirrored)
            pictures = pixels if self.keep else [None] * len(some)
            each = zip(chunk, tensors["mean"], tensors["deviation"], weights, pictures, strict=True)
            for index, mean, deviation, own, picture in each:
                found[index] = EncodedExample(
                    examples[index].caption, mean.clone(), deviation.clone(), own, picture=picture
                )
            known += len(chunk) if was_known else 0
            if time.monotonic() - start > patience:
                patience *= 2
                self.say(f"encoded {len(found) - known} of {len(examples)} pictures, {known} known")
        return [found[index] for index in range(len(examples))]

    def _weights(self, some: Sequence[Example], latents: torch.Size, mirrored: bool) -> Sequence[Tensor | None]:
        if self.background is None:
            return [None] * len(some)
        masks = load_masks(some, size_of(some[0]))
        height, width = latents[-2:]
        return list(pixel_weights(masks.flip(-1) if mirrored else masks, (height, width), self.background))

    def _encoded(self, pixels: Tensor) -> tuple[dict[str, Tensor], bool]:
        @torch.no_grad()
        def compute() -> dict[str, Tensor]:
            mean, deviation = encode_images(self.vae, pixels)
            return {"mean": mean.cpu(), "deviation": deviation.cpu()}

        return self.cache.get(lambda: key_of("pictures", self.fingerprint, pixels), compute)


def anchors_of(instances: Sequence[EncodedExample], token: str) -> list[EncodedExample]:
    """What stands for class pictures where there are none: one's own, whose captions do not name the concept.

    Good only where the target is what the base itself says of them.

    Args:
        instances: One's own pictures.
        token: The placeholder, which is taken out of their captions.
    """
    pattern = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", flags=re.IGNORECASE)

    def anchor(each: EncodedExample) -> EncodedExample:
        caption = " ".join(pattern.sub(" ", each.caption).split())
        mirrored = None if each.mirrored is None else anchor(each.mirrored)
        return replace(each, caption=caption, pixel_weights=None, mirrored=mirrored)

    return list(map(anchor, instances))


def _chunks(examples: Sequence[Example]) -> list[list[int]]:
    """Places of pictures of one size, a few at once."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, example in enumerate(examples):
        sizes.setdefault(size_of(example), []).append(index)
    return [
        places[start : start + _PICTURES_AT_ONCE]
        for places in sizes.values()
        for start in range(0, len(places), _PICTURES_AT_ONCE)
    ]
