"""Learning a base's own weights, to be distilled into an adapter afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from lora_pipeline.adapters.targets import UNET, root
from lora_pipeline.errors import ParamsError
from lora_pipeline.pretrained.components import Components

_PART = "weights"  # where other parameters have the name of their branch


def own_copies(components: Components, precision: str, text_encoder: bool) -> Components:
    """The base with a UNet of its own, and perhaps a text encoder.

    Args:
        components: Comes back as it was.
        precision: What learns is float32, and here all of it learns.
        text_encoder: Whether that learns too; of SDXL both.

    Raises:
        ParamsError: Another precision.
    """
    if precision != "float32":
        problem = f"is {precision}, in which method full would lose most of its small steps"
        raise ParamsError("engine.precision", problem, "use float32")
    copied = components.models if text_encoder else {UNET: components.unet}
    return replace(components, **{name: copy.deepcopy(model) for name, model in copied.items()})


def whole_models(mine: Components, text_encoder: bool) -> dict[str, nn.Parameter]:
    """All parameters of the UNet, and of the text encoder but its token table: `<layer>.weights.<parameter>`."""
    return {f"{layer}.{_PART}.{name}": parameter for layer, name, parameter in _parameters(mine, text_encoder)}


def learnt_weights(mine: Components, text_encoder: bool) -> dict[str, Tensor]:
    """The same by canonical names, on the CPU."""
    return {
        f"{layer}.{name}": parameter.detach().clone().cpu().contiguous()
        for layer, name, parameter in _parameters(mine, text_encoder)
    }


def _parameters(mine: Components, text_encoder: bool) -> Iterator[tuple[str, str, nn.Parameter]]:
    models = mine.models if text_encoder else {UNET: mine.unet}
    for prefix, model in models.items():
        for path, parameter in model.named_parameters():
            layer, _, name = path.removeprefix("text_model.").rpartition(".")
            if not layer.endswith("token_embedding"):
                yield f"{root(prefix)}{layer}", name, parameter
