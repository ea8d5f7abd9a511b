"""`params.yaml` as typed, frozen values, all of which stand in the file: what DVC cannot see it cannot rerun for."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from lora_pipeline.params.defaults import origin, with_defaults
from lora_pipeline.params.faults import explained, suggestion
from lora_pipeline.params.sections import (
    BlendParams,
    ConceptParams,
    EvaluateParams,
    FitParams,
    MergeParams,
    Params,
    PreprocessParams,
    PriorsParams,
    RenderParams,
    WeightParams,
)
from lora_pipeline.params.training import TrainParams
from lora_pipeline.yaml_file import read_yaml

__all__ = [
    "BlendParams",
    "ConceptParams",
    "EvaluateParams",
    "FitParams",
    "MergeParams",
    "Params",
    "PreprocessParams",
    "PriorsParams",
    "RenderParams",
    "TrainParams",
    "WeightParams",
    "load_params",
    "suggestion",
]


def load_params(path: Path) -> Params:
    """Read and check `path`.

    Raises:
        MissingError: There is no such file.
        ParamsError: A key is unknown, missing, or has a value that cannot be; the first fault is told.
    """
    content = read_yaml(path)
    try:
        return Params.model_validate(with_defaults(content))
    except ValidationError as error:
        raise explained(path, error, Params, lambda keys: origin(content, keys)) from None
