"""The `train` section of a concept: how it is learnt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from lora_pipeline.params.values import AtLeastOne, Count, Float, NotNegative, Positive, Section, Text

Share = Annotated[Float, Field(ge=0, le=1)]
Dropout = Annotated[Float, Field(ge=0, lt=1)]


def _window(window: list[float]) -> list[float]:
    if window[0] >= window[1]:
        raise ValueError("a window is [from, to] with from below to")
    return window


# Of the noise levels: 0 is almost a picture, 1 all noise.
Window = Annotated[list[Share], Field(min_length=2, max_length=2), AfterValidator(_window)]


class AdapterParams(Section):
    """What is added to the layers, see injection/."""

    kind: Literal["lora", "dora", "loha", "lokr"]
    rank: AtLeastOne
    alpha: Positive
    ranks: dict[Text, AtLeastOne]
    alphas: dict[Text, Positive]
    rank_stabilised: bool
    init: Literal["kaiming", "normal", "orthogonal", "pissa"]
    factor: AtLeastOne | None
    dropout: Dropout
    rank_dropout: Dropout
    module_dropout: Dropout
    max_norm: Positive | None
    unet_targets: list[Text]
    text_encoder_targets: list[Text]


class TokenParams(Section):
    """The placeholder's embedding."""

    initializer: str
    vectors: Annotated[int, Field(ge=1, le=64)]


class InversionParams(Section):
    """The phase in which the token alone learns."""

    steps: Count
    learning_rate: Positive
    timesteps: Window


class TuningParams(Section):
    """The phase in which weights learn."""

    steps: Count
    learning_rate: Positive
    text_encoder_learning_rate: Positive | Annotated[list[NotNegative], Field(min_length=2, max_length=2)] | None
    token_learning_rate: Positive | None
    token_share: Share | None
    lora_plus_ratio: Positive
    learning_rates: dict[Text, NotNegative]
    timesteps: Window


class PriorLossParams(Section):
    """What keeps the class as it was."""

    weight: NotNegative
    target: Literal["pictures", "prediction"]


class ObjectiveParams(Section):
    """What is minimised, see training/objective.py."""

    loss: Literal["l2", "huber"]
    huber_delta: Positive
    weighting: Literal["plain", "min_snr", "debiased"]
    snr_gamma: Positive
    timesteps: Literal["uniform", "logit_normal"]
    offset_noise: NotNegative
    pyramid_noise: Dropout
    input_perturbation: NotNegative
    zero_terminal_snr: bool
    mask_background: Share | None


class CaptionParams(Section):
    """How captions are shown."""

    dropout: Dropout
    shuffle: bool
    keep_tags: Count


class PictureParams(Section):
    """How pictures are shown."""

    flip: bool
    repeats: dict[Text, AtLeastOne]


class OptimiserParams(Section):
    """How gradients become steps, see training/optimisation.py."""

    name: Text
    options: dict[Text, Any]
    weight_decay: NotNegative
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    schedule_options: dict[Text, Any]
    warm_up: NotNegative
    accumulation: AtLeastOne
    clip_norm: Positive | None
    ema: Annotated[Float, Field(gt=0, lt=1)] | None


class EngineParams(Section):
    """How it is computed; none of it changes what is learnt beyond rounding."""

    precision: Literal["float32", "bfloat16", "float16"]
    gradient_checkpointing: bool
    compile: bool


class ValidationParams(Section):
    """Pictures that are not learnt from, to see how well it goes."""

    every: Count
    pictures: AtLeastOne


class SampleParams(Section):
    """Pictures drawn on the way and at the end."""

    prompt: Text
    every: Count


class TrainParams(Section):
    """How a concept is learnt."""

    method: Literal["lora", "dreambooth", "ti", "pti", "joint", "full"]
    batch_size: AtLeastOne
    inversion: InversionParams
    tuning: TuningParams
    token: TokenParams
    adapter: AdapterParams
    prior: PriorLossParams
    objective: ObjectiveParams
    captions: CaptionParams
    pictures: PictureParams
    optimiser: OptimiserParams
    engine: EngineParams
    validation: ValidationParams
    samples: SampleParams
    checkpoint_every: AtLeastOne
