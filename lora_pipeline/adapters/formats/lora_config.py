r"""PEFT's LoraConfig: which alpha each layer has. `adapter_config.json` holds one, diffusers' files one for each model.

A pattern of `rank_pattern` or `alpha_pattern` is a regular expression in PEFT, matched as `(.*\.)?(pattern)$`, and the
first that fits counts (peft.utils.other.get_pattern_key). Here it is names: a layer's path or its last names, the whole
path after `^`, several of them between `|`. An expression of a stranger's file is never run.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import UNET
from lora_pipeline.errors import CorruptError

Number = TypeVar("Number", int, float)

_TEXT = "text_model."
_DEFAULT_ALPHA = 8  # LoraConfig's own, as is its rank
_NAMES = re.compile(r"\^?[\w.\-]+\$?")
_FIX = "get a plain LoRA, or the file again"
# What makes more of an adapter than its factors: other tensors, other layers, another product.
_REFUSED = (
    "modules_to_save", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters", "use_qalora",
    "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
# Ways to start training that change the base's weights too, by the beginnings of their names.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """The part of PEFT's configuration that decides what an adapter does.

    Args:
        where: What to call it in an error.
        rank: Of layers without a pattern; None where it does not say.
        alpha: Of layers without a pattern.
        ranks, alphas: By pattern.
        rslora: Whether alpha is divided by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732).
        dora: Whether every layer has a magnitude.
    """

    where: str
    rank: int | None
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rslora: bool
    dora: bool

    def alpha_of(self, path: str, rank: int) -> float:
        """The alpha of a layer, such that its change is alpha / rank times up · down.

        Args:
            path: The layer's module path.
            rank: Its factors' rank.

        Raises:
            CorruptError: The configuration says another rank.
        """
        told = self.ranks.get(path, self.rank)
        if told is not None and told != rank:
            problem = f"{path} has rank {rank}, the configuration says {told}"
            raise CorruptError(f"{self.where}.rank_pattern", problem, "get the file again")
        alpha = self.alphas.get(path, self.alpha)
        return float(alpha) * (math.sqrt(rank) if self.rslora else 1.0)


def parse_config(where: str, fields: Mapping[str, Any]) -> LoraConfig:
    """Reads and checks a configuration's fields.

    Args:
        where: What to call them in an error.
        fields: As `LoraConfig.to_dict` gives them; what is missing has PEFT's default.

    Raises:
        CorruptError: It is no plain LoRA's or DoRA's, or a value is of another type than it must be.
    """
    kind = fields.get("peft_type") or "LORA"
    if kind != "LORA":
        raise CorruptError(f"{where}.peft_type", f"{kind!r:.60} is no LoRA", "give a LoRA adapter")
    for name in _REFUSED:
        if fields.get(name):
            raise CorruptError(f"{where}.{name}", "is more than a plain LoRA can hold", "give an adapter without it")
    if fields.get("bias") not in (None, "none"):
        raise CorruptError(f"{where}.bias", "trained biases are no low-rank change", "train with bias: none")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        problem = f"{start!r:.40} changes the base's own weights"
        fix = "save it again with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        raise CorruptError(f"{where}.init_lora_weights", problem, fix)
    rank = fields.get("r")
    return LoraConfig(
        where,
        None if rank is None else _rank(f"{where}.r", rank),
        _alpha(f"{where}.lora_alpha", fields.get("lora_alpha", _DEFAULT_ALPHA)),
        Patterns(dict(_patterns(where, "rank_pattern", fields, _rank))),
        Patterns(dict(_patterns(where, "alpha_pattern", fields, _alpha))),
        _flag(where, "use_rslora", fields),
        _flag(where, "use_dora", fields),
    )


def render_config(model: str, factors: Mapping[str, LoraFactors], dora: bool) -> dict[str, Any]:
    """The fields of a model's factors: the commonest rank and alpha, and by layer what differs.

    A text encoder's paths go unanchored and without `text_model.`, to match live names with and without that level.

    Args:
        model: One of `targets.MODELS`.
        factors: At least one, by module path.
        dora: Whether all of them have magnitudes.
    """
    anchor = "^" if model == UNET else ""
    rank = _commonest(each.rank for each in factors.values())
    alpha = _commonest(each.alpha for each in factors.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {anchor + path: each.rank for path, each in factors.items() if each.rank != rank},
        "alpha_pattern": {anchor + path: each.alpha for path, each in factors.items() if each.alpha != alpha},
        "target_modules": sorted(factors),
        "peft_type": "LORA",
        **({"use_dora": True} if dora else {}),
    }


class Patterns:
    """Numbers by pattern; looking one up costs the names of a path, however many patterns there are.

    Args:
        numbers: By pattern, the first that fits counting.
    """

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self._whole: dict[str, tuple[int, float]] = {}
        self._last: dict[str, tuple[int, float]] = {}
        for place, (pattern, number) in enumerate(numbers.items()):
            for each in pattern.split("|"):
                table = self._whole if each.startswith("^") else self._last
                name = each.replace("\\.", ".").strip("^$").removeprefix(_TEXT)
                table.setdefault(name, (place, number))

    def get(self, path: str, default: Any) -> Any:
        """The number of the first pattern that a module path, with or without `text_model.`, fits."""
        path = path.removeprefix(_TEXT)
        names = path.split(".")
        found = [self._last[last] for start in range(len(names)) if (last := ".".join(names[start:])) in self._last]
        found += [self._whole[path]] if path in self._whole else []
        return min(found)[1] if found else default


def _patterns(where: str, name: str, fields: Mapping[str, Any], read: Any) -> Iterable[tuple[str, Any]]:
    patterns = fields.get(name) or {}
    if not isinstance(patterns, dict):
        raise CorruptError(f"{where}.{name}", f"{patterns!r:.60} is not an object", _FIX)
    for pattern, value in patterns.items():
        if not all(_NAMES.fullmatch(each.replace("\\.", ".")) for each in pattern.split("|")):
            fix = "write out the names of the layers that it stands for"
            raise CorruptError(f"{where}.{name}", f"{pattern!r:.100} is a regular expression, not names", fix)
        yield pattern, read(f"{where}.{name}.{pattern:.100}", value)


def _rank(where: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise CorruptError(where, f"the rank is {value!r:.60}", _FIX)
    return value


def _alpha(where: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise CorruptError(where, f"alpha is {value!r:.60}", _FIX)
    return float(value)


def _flag(where: str, name: str, fields: Mapping[str, Any]) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise CorruptError(f"{where}.{name}", f"{value!r:.60} is neither true nor false", _FIX)
    return bool(value)


def _commonest(values: Iterable[Number]) -> Number:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))
