"""The parameters of a model on disk, by canonical name, read one at a time.

A canonical name is a target (see `targets`) and `.weight` or `.bias`: `unet.conv_in.weight`,
`text_encoder.text_model.final_layer_norm.bias`, whatever the file calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_pipeline.adapters.fingerprint import TEXT_ENCODER_2_WEIGHTS, TEXT_ENCODER_WEIGHTS, UNET_WEIGHTS, weight_files
from lora_pipeline.adapters.header import TensorEntry, read_header
from lora_pipeline.adapters.storage import read_tensor
from lora_pipeline.adapters.targets import TEXT_ENCODER, TEXT_ENCODER_2, UNET, target_of

COMPONENTS = {UNET: UNET_WEIGHTS, TEXT_ENCODER: TEXT_ENCODER_WEIGHTS, TEXT_ENCODER_2: TEXT_ENCODER_2_WEIGHTS}


@dataclass(frozen=True)
class Weights:
    """Where each parameter lies.

    Args:
        places: The file and the entry in its header, by canonical name.
    """

    places: Mapping[str, tuple[Path, TensorEntry]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return self.places[name][1].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights, by target."""
        return {
            name.removesuffix(".weight"): entry.shape
            for name, (_, entry) in self.places.items()
            if name.endswith(".weight")
        }

    def read(self, name: str) -> Tensor:
        """A parameter in the dtype it is stored in."""
        path, entry = self.places[name]
        with path.open("rb") as file:
            return read_tensor(file, entry)


def open_weights(base: Path) -> Weights:
    """The UNet and the text encoders of a diffusers folder; nothing but headers is read.

    Raises:
        MissingError, CorruptError: See `weight_files` and `read_header`.
    """
    places = {}
    for prefix, name in COMPONENTS.items():
        if prefix == TEXT_ENCODER_2 and not (base / name).parent.is_dir():
            continue
        for file in weight_files(base, name):
            for key, entry in read_header(file).tensors.items():
                places[target_of(prefix, key)] = (file, entry)
    return Weights(places)
