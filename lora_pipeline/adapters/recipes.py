"""How several adapters become one: the method, and what each layer of each adapter is multiplied by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from lora_pipeline.adapters.blocks import BlockWeights, block_factors
from lora_pipeline.adapters.targets import UNET, root
from lora_pipeline.errors import ParamsError

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json
    from lora_pipeline.adapters.ranks import RankRule

Method: TypeAlias = Literal["sum", "interpolate", "ties", "dare", "magnitude"]
# What a method needs beside the weights; it takes nothing else.
NEEDS: Mapping[str, str | None] = {
    "sum": None, "interpolate": "at", "ties": "density", "dare": "density", "magnitude": "density",
}  # fmt: skip
_EXAMPLES = {"at": "0.5, in the middle of the path", "density": "0.2, a fifth of the values"}


@dataclass(frozen=True)
class Recipe:
    """How adapters become one; see `composition.blend`.

    Args:
        method: `sum` of the changes; `interpolate` between them; the sum of what is left of them by `dare` or
            `magnitude`, or what `ties` elects.
        at: For `interpolate`: where on the path through the adapters in their order, in [0, 1].
        density: For `ties`, `dare` and `magnitude`: the share of values that is kept, in (0, 1].
        seed: For `dare`: decides which.
        text_encoder_weights: By adapter, the weight of what it changes in the text encoders, where that is another one.
        block_weights: By adapter, factors of its weight; see `blocks.block_factors`.
        rank: How much of each layer of the result to keep; None keeps the sum of the ranks.
        rename_tokens: Whether a token that two adapters use for different rows becomes two, or is refused.

    Raises:
        ParamsError: An unknown method, or a number that it lacks, has no use for, or that is out of its range.
    """

    method: str = "sum"
    at: float | None = None
    density: float | None = None
    seed: int = 0
    text_encoder_weights: Mapping[str, float] = field(default_factory=dict)
    block_weights: Mapping[str, BlockWeights] = field(default_factory=dict)
    rank: RankRule | None = None
    rename_tokens: bool = False

    def __post_init__(self) -> None:
        if self.method not in NEEDS:
            raise ParamsError("method", f"{self.method!r} is unknown", f"use one of {', '.join(NEEDS)}")
        for key, value in (("at", self.at), ("density", self.density)):
            needed = NEEDS[self.method] == key
            if needed and value is None:
                raise ParamsError(key, f"is missing, and method {self.method} needs it", f"give {_EXAMPLES[key]}")
            if value is not None and not needed:
                raise ParamsError(key, f"is {value:g}, and method {self.method} has no use for it", "leave it out")
        if self.at is not None and not 0 <= self.at <= 1:
            raise ParamsError("at", f"{self.at:g} is out of range", "use a number from 0 to 1")
        if self.density is not None and not 0 < self.density <= 1:
            raise ParamsError("density", f"{self.density:g} is out of range", "use a number above 0, up to 1")

    def weights(self, names: Sequence[str], weights: Sequence[float]) -> list[Weights]:
        """What each adapter is multiplied by.

        Args:
            names: Of the adapters.
            weights: As many; on a path, how strong each is where it is alone.

        Raises:
            ParamsError: A weight for an adapter that is not there, or there twice.
        """
        for key in ("text_encoder_weights", "block_weights"):
            for name in getattr(self, key):
                if (times := Counter(names)[name]) != 1:
                    problem = f"names {name!r}, which {'none' if times == 0 else 'more than one'} of the adapters is"
                    raise ParamsError(key, problem, f"use one of {', '.join(sorted(set(names)))}, each a file's own")
        shares = path_shares(len(names), self.at) if self.at is not None else [1.0] * len(names)
        return [
            Weights(name, weight, self.text_encoder_weights.get(name), self.block_weights.get(name), share)
            for name, weight, share in zip(names, weights, shares, strict=True)
        ]

    def document(self) -> dict[str, Json]:
        """What provenance says about it, without the adapters' own weights."""
        numbers = {"at": self.at, "density": self.density, "seed": self.seed if self.method == "dare" else None}
        document: dict[str, Json] = {key: value for key, value in numbers.items() if value is not None}
        if self.rank is not None:
            bound = {"max_rank": self.rank.at_most} if self.rank.at_most is not None else {}
            document["rank"] = {self.rank.kind: self.rank.value, **bound}
        return {"method": self.method, **document}


@dataclass(frozen=True)
class Weights:
    """What one adapter's change is multiplied by.

    Args:
        name: The adapter's.
        unet: In the UNet.
        text_encoder: In the text encoders; None for the same.
        blocks: Factors of it; None for 1 everywhere.
        share: What all of it is multiplied by at a place of a path.
    """

    name: str
    unet: float
    text_encoder: float | None
    blocks: BlockWeights | None
    share: float

    def of(self, targets: Collection[str]) -> dict[str, float]:
        """By target.

        Raises:
            ParamsError: See `block_factors`.
        """
        text_encoder = self.unet if self.text_encoder is None else self.text_encoder
        factors = block_factors(f"block_weights.{self.name}", self.blocks or {}, targets)
        return {
            target: (self.unet if target.startswith(root(UNET)) else text_encoder) * self.share * factor
            for target, factor in factors.items()
        }

    def document(self) -> dict[str, Json]:
        """What provenance says about them."""
        told: dict[str, Json] = {"weight": self.unet}
        if self.text_encoder is not None:
            told["text_encoder_weight"] = self.text_encoder
        if self.blocks:
            told["block_weights"] = self.blocks
        return told


def path_shares(count: int, at: float) -> list[float]:
    """How much of each adapter there is at a place of the path that leads straight from each to the next.

    Args:
        count: How many adapters; they stand at even distances.
        at: From 0, the first, to 1, the last.
    """
    place = at * (count - 1)
    return [max(0.0, 1.0 - abs(place - index)) for index in range(count)]
