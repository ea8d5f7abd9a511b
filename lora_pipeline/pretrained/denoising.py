"""A base's UNet as one function, whatever it reads beside noisy latents: what training and rendering call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lora_pipeline.pretrained.inpainting import channels_given, nothing_given
from lora_pipeline.pretrained.latents import pixels_a_cell

if TYPE_CHECKING:
    from lora_pipeline.pretrained.components import Components


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Prompts as the UNet reads them, a row each.

    Args:
        states: (n, tokens, width); of SDXL both text encoders' side by side.
        pooled: (n, width), SDXL's summary of the prompt by its second text encoder; None of other bases.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Sequence[int] | slice) -> Conditioning:
        """Some of the prompts, in this order."""
        return Conditioning(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def tensors(self) -> dict[str, Tensor]:
        """By the names of `Conditioning(**tensors)`."""
        return {"states": self.states} | ({} if self.pooled is None else {"pooled": self.pooled})

    def to(self, where: torch.device) -> Conditioning:
        """The same on a device."""
        return Conditioning(**{name: tensor.to(where) for name, tensor in self.tensors().items()})


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The prompts of all parts, in order."""
    tensors = [part.tensors() for part in parts]
    return Conditioning(**{name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})


class Denoiser:
    """What a base predicts of noisy latents.

    Args:
        components: The base, with whatever is injected into it.
    """

    def __init__(self, components: Components) -> None:
        self.unet = components.unet
        self.vae = components.vae
        self.inpaints = channels_given(components.unet, components.vae) > 0
        self.blank: Tensor | None = None

    def __call__(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, masked: Tensor | None = None
    ) -> Tensor:
        """The prediction, shaped as the noisy latents, in the dtype of the conditioning.

        Args:
            noisy: (n, channels, height, width).
            timesteps: (n,) or a scalar.
            conditioning: Of n prompts.
            masked: For inpainting bases what is given of the pictures, see `inpainting.masked`; None gives nothing.
        """
        states = conditioning.states
        if self.inpaints:
            given = self._nothing(noisy) if masked is None else masked
            noisy = torch.cat([noisy, given.to(noisy)], dim=1)
        noisy = noisy.to(states).contiguous(memory_format=torch.channels_last)
        added = None
        if conditioning.pooled is not None:
            added = {"text_embeds": conditioning.pooled, "time_ids": self._sizes(noisy).to(states)}
        return cast(Tensor, self.unet(noisy, timesteps, states, added_cond_kwargs=added, return_dict=False)[0])

    def _sizes(self, noisy: Tensor) -> Tensor:
        """(n, 6): SDXL's size before scaling, corner of the crop, and size: a picture nobody scaled or cropped.

        It is what rendering asks for, so that an adapter learns under the conditions it is used under (Podell et al.
        2023, arXiv:2307.01952, section 2.2).
        """
        height, width = (pixels_a_cell(self.vae) * side for side in noisy.shape[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(len(noisy), -1)

    def _nothing(self, noisy: Tensor) -> Tensor:
        if self.blank is None or self.blank.shape[-2:] != noisy.shape[-2:]:
            self.blank = nothing_given(self.vae, noisy[:1])
        return self.blank.expand(len(noisy), -1, -1, -1)
