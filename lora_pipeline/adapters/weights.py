"""The parameters of a model on disk, by canonical name, read one at a time.

A canonical name is a target (see `targets`) and `.weight` or `.bias`: `unet.conv_in.weight`,
`text_encoder.text_model.final_layer_norm.bias`, whatever the file calls it. SDXL's projection of the second text
encoder counts as one of its layers: `text_encoder_2.text_model.text_projection.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_pipeline.adapters.checkpoints.folder import places_in_folder
from lora_pipeline.adapters.checkpoints.single_file import VAE, slots_of_file
from lora_pipeline.adapters.checkpoints.slots import Place, placed
from lora_pipeline.adapters.checkpoints.torch_reader import read_contents
from lora_pipeline.adapters.targets import MODELS, is_target
from lora_pipeline.errors import CorruptError


@dataclass(frozen=True)
class Weights:
    """Where each parameter lies.

    Args:
        places: By canonical name.
    """

    places: Mapping[str, Place]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return self.places[name].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights, by target."""
        return {
            name.removesuffix(".weight"): place.shape for name, place in self.places.items() if name.endswith(".weight")
        }

    def read(self, name: str) -> Tensor:
        """A parameter in the dtype it is stored in."""
        return self.places[name].read()


def open_weights(base: Path) -> Weights:
    """The UNet and the text encoders of a diffusers folder or a single file; nothing but headers is read.

    Raises:
        MissingError, CorruptError: See `weight_files` and `read_header`.
    """
    places = places_in_folder(base, MODELS) if base.is_dir() else places_in_file(base)
    return Weights({name: place for name, place in places.items() if is_target(name)})


def places_of_all(base: Path) -> dict[str, Place]:
    """As `open_weights`, with the autoencoder and, of a single file, whatever else is in it."""
    return places_in_folder(base, (*MODELS, VAE)) if base.is_dir() else places_in_file(base)


def places_in_file(path: Path) -> dict[str, Place]:
    """The place of every tensor of a single-file checkpoint.

    Raises:
        MissingError: No such file.
        CorruptError: See `read_contents`; or without a UNet of these names.
    """
    entries = read_contents(path).tensors
    places = placed(path, entries, slots_of_file(entries))
    if not any(name.startswith("unet.") for name in places):
        problem = "is no checkpoint of SD1.x, SD2.x or SDXL: it has no model.diffusion_model tensors"
        raise CorruptError(str(path), problem, "give a diffusers folder or a single-file checkpoint")
    return places
