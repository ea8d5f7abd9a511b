"""An adapter for a program that wants it plainer, smaller, or in another precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter, check_understood
from lora_pipeline.adapters.compression import truncate
from lora_pipeline.adapters.dora import plain
from lora_pipeline.adapters.extraction import Cut, Extraction, squared_norm
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.weights import Weights
from lora_pipeline.errors import CorruptError, UsageError

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def convert(
    where: str, adapter: Adapter, *, base: Weights | None, rule: RankRule | None, dtype: str | None
) -> Extraction:
    """Changes what is asked for, and nothing else.

    Args:
        where: The file to name in errors.
        adapter: Any adapter.
        base: The weights it was made for, to make a DoRA plain with; None leaves it one.
        rule: How much of each layer's change to keep; None keeps all.
        dtype: One of `PRECISIONS` for factors, magnitudes and tokens; None keeps theirs. Foreign tensors keep theirs.

    Returns:
        The adapter, and what became of the layers that were made plain or cut.

    Raises:
        CorruptError: A DoRA to be cut without its base, or of another base; numbers beyond the dtype's range.
        UsageError: An unknown dtype.
    """
    if dtype is not None and dtype not in PRECISIONS:
        raise UsageError("--dtype", f"{dtype!r} is unknown", f"use one of {', '.join(PRECISIONS)}")
    made, layers = plain(adapter, base, rule) if base is not None else (adapter, {})
    if rule is not None:
        check_understood(where, replace(made, foreign={}))
        factors = dict(made.factors)
        for target in factors.keys() - layers.keys():
            norm = max(0.0, squared_norm(factors[target])) ** 0.5
            factors[target], residual = truncate(factors[target], rule)
            layers[target] = Cut(factors[target].rank, norm, residual)
        made = replace(made, factors=factors)
    return Extraction(made if dtype is None else _of_precision(made, PRECISIONS[dtype]), dict(sorted(layers.items())))


def _of_precision(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    def each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}

    factors = {
        target: LoraFactors(_cast(target, each.down, dtype), _cast(target, each.up, dtype), each.alpha)
        for target, each in adapter.factors.items()
    }
    return replace(
        adapter,
        factors=factors,
        embeddings=each(adapter.embeddings),
        embeddings_2=each(adapter.embeddings_2),
        magnitudes=each(adapter.magnitudes),
    )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        problem = f"is beyond the range of {str(dtype).removeprefix('torch.')}"
        raise CorruptError(name, problem, "use --dtype float32 or bfloat16")
    return cast
