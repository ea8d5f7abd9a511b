"""One module's tensors as kohya's scripts and LyCORIS store them, read into exact factors whatever their kind.

Kinds by the suffixes of the module's keys (facts of https://github.com/KohakuBlueleaf/LyCORIS, `lycoris/modules`):

- LoRA, LoCon: `lora_down.weight`, `lora_up.weight`; with `lora_mid.weight` up (out, r), mid (r, r, h, w), down (r, in).
- LoHa: (hada_w1_a · hada_w1_b) ∘ (hada_w2_a · hada_w2_b), each a LoRA with the kernel flattened into its columns; with
  `hada_t1`, `hada_t2` each is Tucker's form, whose a is (r, out).
- LoKr: lokr_w1 ⊗ lokr_w2, either of which may be `_a` · `_b`, the second also Tucker's form with `lokr_t2`.
- full: `diff`, the change itself.

The first three are multiplied by `alpha` / r, but a LoKr of two full matrices is not. `dora_scale` makes any of them a
DoRA. Whatever else there is (`diff_b`, `w_norm`, `bias_values`, `oft_blocks`, ...) adds nothing to a weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lora_pipeline.adapters.lora import LoraFactors, times_identity
from lora_pipeline.adapters.products import Pair, hadamard, kronecker
from lora_pipeline.errors import CorruptError

_FIX = "get the file again"
_LARGEST = 2**27  # numbers in a module's factors; the largest of a full SDXL module is a quarter of this
# Layers with a 3 x 3 kernel in every Stable Diffusion: LoHa and older LoKr files flatten it away.
_KERNELS = ("conv1", "conv2", "conv_in", "conv_out", "conv")


def module_factors(
    name: str, tensors: Mapping[str, Tensor]
) -> tuple[LoraFactors | None, Tensor | None, dict[str, Tensor]]:
    """Reads one module.

    Args:
        name: The module's target, which tells its kernel where the file does not; also for errors.
        tensors: By suffix, such as `lora_up.weight` or `alpha`.

    Returns:
        The factors, whose change is the module's exactly (to float32 rounding for a product of four matrices), or None
        where nothing of it is a change of a weight; a DoRA's magnitude, shaped as `Adapter` says; and what is left
        over, by suffix.

    Raises:
        CorruptError: Half of a pair is missing, shapes do not belong together, or two kinds are mixed.
    """
    rest = dict(tensors)
    kinds = {kind: read for kind, (mark, read) in _KINDS.items() if any(map(mark.fullmatch, rest))}
    if "diff" in rest and rest["diff"].ndim not in (2, 4):  # of a norm's scale or of a bias
        kinds.pop("a full change")
    if not kinds:
        return None, None, rest
    if len(kinds) > 1:
        raise CorruptError(name, f"is stored as {' and '.join(kinds)} at once", _FIX)
    try:
        factors = next(iter(kinds.values()))(name, rest)
    except CorruptError as error:
        raise CorruptError(name, error.problem, error.fix) from None
    scale = rest.pop("dora_scale", None)
    return factors, None if scale is None else magnitude(name, scale, factors), rest


def alpha_of(name: str, alpha: Tensor | None, rank: int) -> float:
    """A module's alpha: the rank where the file has none; 0 is no change, as it says.

    Args:
        name: The module, for the error.
        alpha: One number in a tensor of any shape and dtype.
        rank: What it is divided by.

    Raises:
        CorruptError: It is not one finite number.
    """
    if alpha is None:
        return float(rank)
    if alpha.numel() != 1 or not math.isfinite(alpha.item()):
        raise CorruptError(name, f"its alpha {alpha.flatten().tolist()!r:.60} is not one finite number", _FIX)
    return float(alpha.item())


def magnitude(name: str, scale: Tensor, factors: LoraFactors) -> Tensor:
    """A DoRA's norms, shaped to broadcast against the weight: one by row or one by column.

    Args:
        name: The module, for the error.
        scale: (out,), (out, 1, ...) or (1, in, ...).
        factors: Of the same module.

    Raises:
        CorruptError: It has another number of values.
    """
    rows, columns = factors.up.shape[0], factors.down.shape[1]
    tail = [1] * (factors.down.ndim - 2)
    if scale.ndim > 1 and scale.shape[0] == 1 and scale.numel() == columns:
        return scale.reshape(1, columns, *tail)
    if scale.numel() == rows:
        return scale.reshape(rows, 1, *tail)
    problem = f"its dora_scale {tuple(scale.shape)} fits neither its {rows} rows nor its {columns} columns"
    raise CorruptError(name, problem, _FIX)


def _plain(name: str, rest: dict[str, Tensor]) -> LoraFactors:
    up, down = _take(name, rest, "lora_up.weight"), _take(name, rest, "lora_down.weight")
    alpha = alpha_of(name, rest.pop("alpha", None), down.shape[0])
    if "lora_mid.weight" in rest:
        down = _tucker(name, _take(name, rest, "lora_mid.weight"), down).float()
        up = up.flatten(1)[:, :, None, None]
    return LoraFactors(down, up, alpha)


def _hadamard(name: str, rest: dict[str, Tensor]) -> LoraFactors:
    kernel = _kernel(name, rest, ("hada_t1", "hada_w1_b"))
    if ("hada_t1" in rest) != ("hada_t2" in rest):
        raise CorruptError(name, "has only one of hada_t1 and hada_t2", _FIX)
    (a1, b1), (a2, b2) = _pair(name, rest, "hada_w1", "hada_t1"), _pair(name, rest, "hada_w2", "hada_t2")
    if a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1]:
        raise CorruptError(name, f"its halves are {_product(a1, b1)} and {_product(a2, b2)}", _FIX)
    scale = alpha_of(name, rest.pop("alpha", None), b1.shape[0]) / b1.shape[0]
    rows, columns, rank = a1.shape[0], b1.shape[1], b1.shape[0] * b2.shape[0]
    _check_size(name, rows, columns, rank)
    if rank > min(rows, columns):
        return _factors(times_identity((a1 @ b1) * (a2 @ b2)), scale, kernel)
    return _factors(hadamard((a1, b1), (a2, b2)), scale, kernel)


def _kronecker(name: str, rest: dict[str, Tensor]) -> LoraFactors:
    kernel = _kernel(name, rest, ("lokr_t2", "lokr_w2", "lokr_w2_b"))
    whole = {side for side in ("lokr_w1", "lokr_w2") if side in rest}
    (a1, b1), (a2, b2) = (
        times_identity(_take(name, rest, side).double().flatten(1))
        if side in whole
        else _pair(name, rest, side, "lokr_t2")
        for side in ("lokr_w1", "lokr_w2")
    )
    inner = b1.shape[0] if "lokr_w2" in whole else b2.shape[0]
    alpha = alpha_of(name, rest.pop("alpha", None), inner)
    scale = 1.0 if len(whole) == 2 else alpha / inner
    rows, columns, rank = a1.shape[0] * a2.shape[0], b1.shape[1] * b2.shape[1], b1.shape[0] * b2.shape[0]
    _check_size(name, rows, columns, rank)
    if rank > min(rows, columns):
        return _factors(times_identity(torch.kron(a1 @ b1, a2 @ b2)), scale, kernel)
    return _factors(kronecker((a1, b1), (a2, b2)), scale, kernel)


def _change(name: str, rest: dict[str, Tensor]) -> LoraFactors:
    change = _take(name, rest, "diff")
    rest.pop("alpha", None)  # nobody multiplies a full change by it
    _check_size(name, change.shape[0], change.shape[1:].numel(), min(change.shape[0], change.shape[1:].numel()))
    return _factors(times_identity(change.flatten(1)), 1.0, tuple(change.shape[2:]))


# The keys that tell each kind, and who reads it.
_KINDS: dict[str, tuple[re.Pattern[str], Callable[[str, dict[str, Tensor]], LoraFactors]]] = {
    "a LoRA": (re.compile(r"lora_(up|down|mid)\.weight"), _plain),
    "a LoHa": (re.compile(r"hada_(w[12]_[ab]|t[12])"), _hadamard),
    "a LoKr": (re.compile(r"lokr_(w[12](_[ab])?|t2)"), _kronecker),
    "a full change": (re.compile(r"diff"), _change),
}


def _take(name: str, rest: dict[str, Tensor], suffix: str) -> Tensor:
    tensor = rest.pop(suffix, None)
    if tensor is None:
        raise CorruptError(name, f"has no {suffix} beside its other half", _FIX)
    if tensor.ndim not in (2, 4) or tensor.numel() == 0:
        raise CorruptError(name, f"its {suffix} has the shape {tuple(tensor.shape)}", _FIX)
    return tensor


def _pair(name: str, rest: dict[str, Tensor], side: str, tucker: str) -> Pair:
    """One factorised matrix of a LoHa or a LoKr."""
    a, b = _take(name, rest, f"{side}_a").double().flatten(1), _take(name, rest, f"{side}_b").double()
    if tucker in rest and side.endswith(tucker[-1]):  # t1 belongs to w1, t2 to w2
        a, b = a.T.contiguous(), _tucker(name, _take(name, rest, tucker), b)
    b = b.flatten(1)
    if a.shape[1] != b.shape[0]:
        raise CorruptError(name, f"its {side}_a and {side}_b are of ranks {a.shape[1]} and {b.shape[0]}", _FIX)
    return a, b


def _tucker(name: str, core: Tensor, down: Tensor) -> Tensor:
    """A core (r, s, height, width) with its second axis taken to the inputs by `down` (s, in); float64."""
    if core.ndim != 4 or core.shape[1] != down.shape[0] or down.shape[2:].numel() != 1:
        raise CorruptError(name, f"its core {tuple(core.shape)} does not fit {tuple(down.shape)}", _FIX)
    _check_size(name, core.shape[0], core.shape[2:].numel() * down.shape[1], core.shape[0])
    return torch.einsum("rshw,si->rihw", core.double(), down.double().flatten(1))


def _kernel(name: str, rest: Mapping[str, Tensor], where: tuple[str, ...]) -> tuple[int, ...]:
    """The kernel that a tensor shows, or the layer's name tells; none for a linear layer."""
    shown = [tuple(rest[suffix].shape[2:]) for suffix in where if suffix in rest and rest[suffix].ndim == 4]
    return shown[0] if shown else (3, 3) if name.rpartition(".")[2] in _KERNELS else ()


def _factors(pair: Pair, scale: float, kernel: tuple[int, ...]) -> LoraFactors:
    up, down = (each.float() if each.dtype == torch.float64 else each for each in pair)
    rank = up.shape[1]
    if kernel:
        if down.shape[1] % math.prod(kernel):
            raise CorruptError("factors", f"{down.shape[1]} columns are no whole kernels of {kernel}", _FIX)
        down, up = down.reshape(rank, -1, *kernel), up.reshape(*up.shape, 1, 1)
    return LoraFactors(down, up, alpha=scale * rank)


def _check_size(name: str, rows: int, columns: int, rank: int) -> None:
    numbers = (rows + columns) * min(rank, rows, columns)
    if numbers > _LARGEST:
        problem = f"would take {numbers:,} numbers, as a change of {rows} x {columns}"
        raise CorruptError(name, problem, "give an adapter of a Stable Diffusion")


def _product(a: Tensor, b: Tensor) -> tuple[int, int]:
    return a.shape[0], b.shape[1]
