"""The tensors that make up a layer's change in the files of diffusers and PEFT, in all the spellings there have been.

X and Y are module paths below the model; the newest comes last::

    Y.processor.to_q_lora.down.weight, ...up.weight                     X is Y.to_q, for to_out_lora Y.to_out.0
    X.lora.down.weight, X.lora.up.weight                                in UNets
    X.lora_linear_layer.down.weight, X.lora_linear_layer.up.weight      in text encoders
    X.lora_A.weight, X.lora_B.weight                                    PEFT's; live ones have `.default` inside

and beside them `X.lora_magnitude_vector` (DoRA's norms, (out,), or (1, out, 1, 1) of a convolution) and `X.alpha`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats.lora_config import LoraConfig
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import UNET, module_path, target_of
from lora_pipeline.errors import CorruptError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
MAGNITUDE = ".lora_magnitude_vector"
_ALPHA = ".alpha"
_ADAPTERS = ("", ".default", ".default_0")
_OLD = (".lora", "_lora", ".lora_linear_layer")
_ENDINGS = {
    **{f".lora_A{adapter}.weight": DOWN for adapter in _ADAPTERS},
    **{f".lora_B{adapter}.weight": UP for adapter in _ADAPTERS},
    **{f"{old}.down.weight": DOWN for old in _OLD},
    **{f"{old}.up.weight": UP for old in _OLD},
    **{f"{MAGNITUDE}{adapter}{end}": MAGNITUDE for adapter in _ADAPTERS for end in ("", ".weight")},
}
# What the first attention processors called the parts of CLIP's attention.
_OF_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def part_of(key: str) -> tuple[str, str] | None:
    """The module path and the kind of part (`DOWN`, `UP`, `MAGNITUDE` or alpha) of a key, or None: it is none."""
    owner = key.removesuffix(_ALPHA)
    if owner == key:
        return _ending(key)
    path = (_ending(owner) or (owner, ""))[0]  # some wrote it behind the whole name of a half
    path = next((path.removesuffix(old) for old in _OLD if path.endswith(old)), path)
    return (path, _ALPHA) if path else None


def _ending(key: str) -> tuple[str, str] | None:
    found = ((key.removesuffix(ending), kind) for ending, kind in _ENDINGS.items() if key.endswith(ending))
    return next((part for part in found if part[0]), None)


@dataclass
class Parts:
    """The parts found in a file, by target.

    Args:
        found: The key in the file and the tensor, by target and kind.
        models: The model and the module path, by target.
    """

    found: dict[str, dict[str, tuple[str, Tensor]]] = field(default_factory=dict)
    models: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, model: str, key: str, name: str, tensor: Tensor) -> bool:
        """Takes a tensor in, if it is a part.

        Args:
            model: Which model it belongs to.
            key: Its name below the model.
            name: Its name in the file.
            tensor: Itself.

        Returns:
            Whether it is a part.

        Raises:
            CorruptError: The layer has that part already.
        """
        part = part_of(key)
        if part is None:
            return False
        path = _module(model, part[0])
        target = target_of(model, path)
        others = self.found.setdefault(target, {})
        if part[1] in others:
            problem = f"is there twice, here and as {others[part[1]][0]}"
            raise CorruptError(name, problem, "take one of the two out")
        others[part[1]] = name, tensor
        self.models[target] = model, path
        return True

    def factors(self, configs: Mapping[str, LoraConfig]) -> dict[str, LoraFactors]:
        """The factors by target.

        Args:
            configs: By model; without one alpha is the rank.

        Raises:
            CorruptError: A half without the other, or parts that do not fit each other or the configuration.
        """
        return {target: self._factors(target, configs.get(model)) for target, (model, _) in self.models.items()}

    def _factors(self, target: str, config: LoraConfig | None) -> LoraFactors:
        parts = self.found[target]
        for kind in (DOWN, UP):
            if kind not in parts:
                name = min(parts.values(), key=lambda part: part[0])[0]
                raise CorruptError(name, f"has no {kind.split('.')[1]} beside it", "get the file again")
        down, up = parts[DOWN][1], parts[UP][1]
        rank = down.shape[0] if down.ndim else 0
        if _ALPHA in parts:
            alpha = _number(*parts[_ALPHA])
        else:
            alpha = config.alpha_of(self.models[target][1], rank) if config else float(rank)
        try:
            return LoraFactors(down, up, alpha)
        except CorruptError as error:
            raise CorruptError(parts[DOWN][0], error.problem, error.fix) from None

    def magnitudes(self, factors: Mapping[str, LoraFactors], configs: Mapping[str, LoraConfig]) -> dict[str, Tensor]:
        """DoRA's magnitudes by target, shaped (out, 1[, 1, 1]).

        Raises:
            CorruptError: Only some of a model's layers have one, which PEFT cannot mean, or one has another size.
        """
        doras = {model for target, (model, _) in self.models.items() if MAGNITUDE in self.found[target]}
        doras |= {model for model, config in configs.items() if config.dora}
        found = {}
        for target, (model, _) in self.models.items():
            if model not in doras:
                continue
            name = self.found[target][DOWN][0]
            if MAGNITUDE not in self.found[target]:
                problem = (
                    "has no lora_magnitude_vector, though the model's use_dora is set or its other layers have one"
                )
                raise CorruptError(name, problem, "get the file again")
            name, norms = self.found[target][MAGNITUDE]
            up = factors[target].up
            if norms.numel() != up.shape[0] or norms.numel() != max(norms.shape, default=1):
                problem = f"has shape {tuple(norms.shape)}, the layer has {up.shape[0]} outputs"
                raise CorruptError(name, problem, "get the file again")
            found[target] = norms.reshape(-1, *[1] * (up.ndim - 1))
        return found


def named_parts(adapter: Adapter, spelled: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors of an adapter's layers in the newest spelling.

    Args:
        adapter: Any.
        spelled: A target as its keys begin.

    Raises:
        CorruptError: Magnitudes of a kind that PEFT does not have.
    """
    tensors = {}
    for targets in by_model(adapter).values():
        dora = is_dora(adapter, targets)
        for target in targets:
            start, factors = spelled(target), adapter.factors[target]
            tensors[start + DOWN], tensors[start + UP] = factors.down, factors.up
            if dora:
                # PEFT saves it without `.weight` and reads both; transformers 5 reads only this
                tensors[f"{start}{MAGNITUDE}.weight"] = _magnitude(target, adapter)
    return tensors


def by_model(adapter: Adapter) -> dict[str, list[str]]:
    """The targets of each model that has any, sorted."""
    models: dict[str, list[str]] = {}
    for target in sorted(adapter.factors):
        models.setdefault(target.partition(".")[0], []).append(target)
    return models


def is_dora(adapter: Adapter, targets: list[str]) -> bool:
    """Whether a model's layers have magnitudes.

    Raises:
        CorruptError: Only some have.
    """
    having = [target in adapter.magnitudes for target in targets]
    if any(having) and not all(having):
        target = targets[having.index(False)]
        problem = "has no magnitude, other layers of its model have: PEFT's use_dora is for all or none"
        raise CorruptError(target, problem, "make a plain adapter of it: lora-pipe convert IN OUT --base BASE")
    return any(having)


def by_path(adapter: Adapter, targets: list[str]) -> dict[str, LoraFactors]:
    """A model's factors by module path."""
    return {module_path(target): adapter.factors[target] for target in targets}


def _magnitude(target: str, adapter: Adapter) -> Tensor:
    norms, up = adapter.magnitudes[target], adapter.factors[target].up
    if norms.shape[:1] != up.shape[:1] or norms.numel() != up.shape[0]:
        problem = f"has a magnitude of shape {tuple(norms.shape)}; PEFT has norms of rows, ({up.shape[0]}, 1), only"
        raise CorruptError(target, problem, "make a plain adapter of it: lora-pipe convert IN OUT --base BASE")
    return norms.reshape(-1) if up.ndim == 2 else norms.reshape(1, -1, 1, 1)


def _module(model: str, path: str) -> str:
    path = path.replace(".processor.", ".")
    start, _, last = path.rpartition(".")
    if model == UNET:
        return f"{path}.0" if last == "to_out" else path
    return f"{start}.{_OF_CLIP[last]}" if last in _OF_CLIP else path


def _number(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise CorruptError(name, f"alpha has shape {tuple(tensor.shape)}", "get the file again")
    return float(tensor)
