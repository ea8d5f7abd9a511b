"""Class pictures: what the base paints of its own accord, kept between runs so that more of them cost only the new.

They are drawn in whole blocks, so that a picture is always drawn beside the same others and has the same bytes
however the count grew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from lora_pipeline.data.dataset import write_metadata
from lora_pipeline.data.images import open_picture
from lora_pipeline.errors import CorruptError, MissingError
from lora_pipeline.keeping import content_key
from lora_pipeline.params import PriorsParams
from lora_pipeline.pretrained import denoising, encoding, latents
from lora_pipeline.pretrained.components import Components
from lora_pipeline.rendering import sampling

BLOCK = 16
_LIBRARIES = ("diffusers", "torch", "transformers")


def cache_folder(root: Path, base: Path, params: PriorsParams, seed: int) -> Path:
    """Where pictures are kept that agree in all but their number: of one base, prompt, sampler and seed."""
    section = {
        "params": params.model_dump(mode="json", exclude={"count"}),
        "seed": seed,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    code = [Path(str(module.__file__)) for module in (denoising, encoding, latents, sampling)]
    return root / content_key(section, [base, *code])[:32]


def write_priors(
    components: Components,
    params: PriorsParams,
    seed: int,
    cache: Path,
    out: Path,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Writes the class pictures 0000.png, 0001.png, ... and their `metadata.jsonl`.

    Args:
        components: The base.
        params: What to draw; none if the count is 0.
        seed: Of all pictures; each has its own of it and its index.
        cache: See `cache_folder`; pictures that are there already are not drawn again.
        out: A folder; made.
        advance: Is told how many pictures are written.

    Raises:
        ParamsError: See `sample`.
    """
    out.mkdir(parents=True)
    cache.mkdir(parents=True, exist_ok=True)
    names = [f"{index:04}.png" for index in range(params.count)]
    for start in range(0, params.count, BLOCK):
        wanted = names[start : start + BLOCK]
        if not all(_is_whole(cache / name) for name in wanted):
            _draw_block(components, params, seed, start, cache)
        for name in wanted:
            shutil.copyfile(cache / name, out / name)
        if advance is not None:
            advance(start + len(wanted))
    write_metadata(out, dict.fromkeys(names, params.prompt))


def _draw_block(components: Components, params: PriorsParams, seed: int, start: int, cache: Path) -> None:
    indices = range(start, start + BLOCK)
    images = sampling.sample(
        components,
        [params.prompt] * BLOCK,
        [(seed << 32) + index for index in indices],
        steps=params.steps,
        guidance_scale=params.guidance_scale,
        negative_prompt="",
        weighting=None,
        batch=sampling.pictures_at_once(components),
    )
    for index, image in zip(indices, images, strict=True):
        building = cache / f".{index:04}.{os.getpid()}.png"  # another concept may draw the same
        Image.fromarray(image).save(building, format="PNG")
        building.replace(cache / f"{index:04}.png")


def _is_whole(path: Path) -> bool:
    try:
        open_picture(path)
    except (CorruptError, MissingError):
        return False
    return True
