"""The ways diffusers knows from noise to a picture, by name, on a base's own noise schedule."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import diffusers

from lora_pipeline.errors import MissingError, ParamsError

# diffusers' classes without `Scheduler`, of those that follow a base's betas and prediction type.
SAMPLERS = (
    "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE", "DPMSolverSinglestep",
    "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM",
    "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
)  # fmt: skip


def sampler_of(scheduler: Any, name: str | None, options: Mapping[str, Any]) -> Any:
    """A sampler on the noise schedule of a base.

    Args:
        scheduler: The base's own, whose settings count where `options` say nothing.
        name: One of `SAMPLERS`; None for the base's own.
        options: Of the class, such as `use_karras_sigmas`.

    Raises:
        ParamsError: No such sampler, or an option that it does not have or does not take.
        MissingError: A package that it needs is not installed.
    """
    if name is not None and name not in SAMPLERS:
        raise ParamsError("sampler", f"there is no {name!r}", f"use one of {', '.join(SAMPLERS)}, or null")
    kind = type(scheduler) if name is None else getattr(diffusers, f"{name}Scheduler")
    known = [each for each in inspect.signature(kind.__init__).parameters if each != "self"]
    for option in options:
        if option not in known:
            raise ParamsError("sampler_options", f"{kind.__name__} has no {option!r}", f"it has {', '.join(known)}")
    if name is None and not options:
        return scheduler
    try:
        return kind.from_config(scheduler.config, **options)
    except ImportError as error:
        found = re.search(r"requires the (\S+)", str(error))
        package = found[1] if found else "it"
        raise MissingError(
            "sampler", f"{name} needs {package}, which is not installed", f"pip install {package}"
        ) from error
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ParamsError("sampler_options", f"{kind.__name__} refuses them: {error}", "correct them") from error
