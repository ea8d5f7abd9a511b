"""Values of a training run, by dotted keys such as `tuning.steps`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

VALUES: Mapping[str, Any] = {
    "method": "pti", "batch_size": 2, "checkpoint_every": 2,
    "inversion.steps": 3, "inversion.learning_rate": 0.02, "inversion.timesteps": [0.0, 1.0],
    "tuning.steps": 4, "tuning.learning_rate": 0.01, "tuning.text_encoder_learning_rate": None,
    "tuning.token_learning_rate": None, "tuning.token_share": None, "tuning.lora_plus_ratio": 1.0,
    "tuning.learning_rates": {}, "tuning.timesteps": [0.0, 1.0],
    "token.initializer": "creature", "token.vectors": 1,
    "adapter.kind": "lora", "adapter.factor": None, "adapter.dropout": 0.0, "adapter.rank_dropout": 0.0,
    "adapter.module_dropout": 0.0, "adapter.max_norm": None,
    "adapter.rank": 2, "adapter.alpha": 2.0, "adapter.ranks": {}, "adapter.alphas": {},
    "adapter.rank_stabilised": False, "adapter.init": "kaiming", "adapter.unet_targets": ["*attn*.to_?", "*.conv1"],
    "adapter.text_encoder_targets": [],
    "prior.weight": 1.0, "prior.target": "pictures",
    "objective.loss": "l2", "objective.huber_delta": 0.1, "objective.weighting": "plain", "objective.snr_gamma": 5.0,
    "objective.timesteps": "uniform", "objective.offset_noise": 0.0, "objective.pyramid_noise": 0.0,
    "objective.input_perturbation": 0.0, "objective.zero_terminal_snr": False, "objective.mask_background": None,
    "captions.dropout": 0.0, "captions.shuffle": False, "captions.keep_tags": 1,
    "pictures.flip": False, "pictures.repeats": {},
    "optimiser.name": "adamw", "optimiser.options": {"betas": [0.9, 0.99]}, "optimiser.weight_decay": 0.01,
    "optimiser.schedule": "constant", "optimiser.schedule_options": {}, "optimiser.warm_up": 0.05,
    "optimiser.accumulation": 1,
    "optimiser.clip_norm": 1.0, "optimiser.ema": None,
    "engine.precision": "float32", "engine.gradient_checkpointing": False, "engine.compile": False,
    "validation.every": 0, "validation.pictures": 1, "samples.every": 0, "samples.prompt": "a creature",
}  # fmt: skip


def train_params(changes: Mapping[str, Any]) -> Any:
    """The values above with some of them changed, as nested namespaces.

    Raises:
        KeyError: A key that there is not.
    """
    if unknown := set(changes) - set(VALUES):
        raise KeyError(unknown)
    root = SimpleNamespace()
    for key, value in {**VALUES, **changes}.items():
        *sections, name = key.split(".")
        section = root
        for each in sections:
            section.__dict__.setdefault(each, SimpleNamespace())
            section = getattr(section, each)
        setattr(section, name, value)
    return root
