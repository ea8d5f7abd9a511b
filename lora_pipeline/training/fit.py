"""How the weights of a blend are learnt: what is asked for, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_pipeline.errors import ParamsError

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json

# What a weight may be for, by method.
GRANULARITIES: Mapping[str, Sequence[str]] = {
    "least_squares": ("adapter", "block"),
    "distill": ("adapter", "block", "column"),
}
TRAJECTORY_STEPS = 10  # denoising steps of one drawn picture


@dataclass(frozen=True)
class Scene:
    """Prompts that ask for some adapters and no others.

    Args:
        name: The adapters' names, joined by +.
        adapters: Their names; at least one.
        prompts: At least one.
    """

    name: str
    adapters: tuple[str, ...]
    prompts: Sequence[str]


@dataclass(frozen=True)
class Fit:
    """What is learnt, and from what.

    Args:
        method: `least_squares`, in closed form, or `distill`, by gradient descent.
        granularity: A weight for each `adapter`, for each `block` of each adapter, or (`distill` alone) for each input
            `column` of each of its layers.
        prompts: What an adapter is for, by its name, and what several are for together, by their names joined by +;
            at least one each.
        draws: Trajectories of each scene, at least 1; its prompts take turns.
        steps: Of the optimiser, at least 1; `least_squares` has none.
        learning_rate: Of the weights, which are around 1; above 0.
        regularisation: At least 0. `least_squares`: how strongly weights are drawn to the given ones, as a share of
            each adapter's energy. `distill` with columns: weight of the overlap between adapters.
        seed: Decides the noise and the order.

    Raises:
        ParamsError: A value out of its range.
    """

    method: str
    granularity: str
    prompts: Mapping[str, Sequence[str]]
    draws: int
    steps: int
    learning_rate: float
    regularisation: float
    seed: int

    def __post_init__(self) -> None:
        if self.method not in GRANULARITIES:
            raise ParamsError("method", f"{self.method!r} learns nothing", f"use {' or '.join(GRANULARITIES)}")
        known = GRANULARITIES[self.method]
        if self.granularity not in known:
            problem = f"{self.granularity!r} is none of method {self.method}"
            raise ParamsError("granularity", problem, f"use {' or '.join(known)}")
        if self.draws < 1:
            raise ParamsError("draws", f"{self.draws} is out of range", "use 1 or more")
        if self.method == "distill" and self.steps < 1:
            raise ParamsError("steps", f"{self.steps} is out of range", "use 1 or more, as 200")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ParamsError("learning_rate", f"{self.learning_rate:g} is out of range", "use a number above 0")
        if not (math.isfinite(self.regularisation) and self.regularisation >= 0):
            raise ParamsError("regularisation", f"{self.regularisation:g} is out of range", "use a number from 0")

    def work(self) -> int:
        """How many steps learning has: those that draw, and the optimiser's."""
        return len(self.prompts) * TRAJECTORY_STEPS + (self.steps if self.method == "distill" else 0)

    def scenes(self, names: Collection[str]) -> list[Scene]:
        """What `prompts` says, of these adapters.

        Raises:
            ParamsError: Two adapters of one name, prompts of an adapter that is not there, or one without prompts.
        """
        if len(set(names)) != len(names):
            raise ParamsError("weights", "two of the adapters have one name", "give each file a name of its own")
        scenes = [
            Scene(key, (key,) if key in names else tuple(key.split("+")), each) for key, each in self.prompts.items()
        ]
        told = {name for scene in scenes for name in scene.adapters}
        if odd := told - set(names):
            known = ", ".join(names)
            raise ParamsError(
                "prompts", f"has some for {min(odd)!r}, which is no adapter here", f"use names of {known}"
            )
        if silent := set(names) - told:
            raise ParamsError("prompts", f"has none for {min(silent)!r}", "say there what it is for")
        return scenes

    def document(self) -> dict[str, Json]:
        """What provenance says about it."""
        prompts: dict[str, Json] = {name: list(each) for name, each in self.prompts.items()}
        numbers: dict[str, Json] = {"draws": self.draws, "regularisation": self.regularisation, "seed": self.seed}
        if self.method == "distill":
            numbers |= {"learning_rate": self.learning_rate, "steps": self.steps}
        return {"granularity": self.granularity, "method": self.method, "prompts": prompts, **numbers}
