"""Masks as weights of the loss: what lies outside the subject counts less."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pixel_weights(masks: Tensor, size: tuple[int, int], background: float) -> Tensor:
    """Each latent's factor of the loss; of a picture their mean is 1, so that no picture counts more than another.

    Args:
        masks: (n, 1, height, width) in [0, 1]: 1 is the subject. Not all of a picture 0.
        size: (height, width) of the latents; a latent's mask is the mean over its area.
        background: The weight outside against 1 inside, in [0, 1].

    Returns:
        (n, 1, *size) in the masks' dtype.
    """
    weights = background + (1.0 - background) * F.interpolate(masks, size=size, mode="area")
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)
