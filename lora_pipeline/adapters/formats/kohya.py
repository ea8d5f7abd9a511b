"""The format of kohya's scripts, which AUTOMATIC1111, ComfyUI and most published files use.

Tensors: `<module>.lora_down.weight` (rank, in[, height, width]), `<module>.lora_up.weight` (out, rank[, 1, 1]),
`<module>.alpha` (one number; the rank where it is missing), and where a convolution is decomposed further
`<module>.lora_mid.weight` (rank, rank, height, width) with a 1 x 1 down. `kohya_names` says what modules are called.
Bundled embeddings: `bundle_emb.<token>.emb_params` or `.string_to_param.*`, and for SDXL `.clip_l` and `.clip_g`.
Metadata: see `kohya_metadata`. Facts of https://github.com/kohya-ss/sd-scripts (`networks/lora.py`) and of
https://github.com/AUTOMATIC1111/stable-diffusion-webui (`extensions-builtin/Lora`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats.kohya_metadata import facts, metadata_of, provenance_of, says_sdxl, source_metadata
from lora_pipeline.adapters.kohya_names import (
    PREFIXES,
    STARTS,
    key_of_token,
    module_of_target,
    target_of_module,
    token_of_key,
)
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import TEXT_ENCODER_2, root
from lora_pipeline.adapters.topology import SDXL, families
from lora_pipeline.errors import CorruptError

_DOWN, _UP, _MID, _ALPHA, _MAGNITUDE = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"
_LARGEST = 2**27  # numbers in one factor; SDXL's widest convolution at full rank has half of this
_FIX = "get the file again"


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads the adapter out of a file's tensors and metadata.

    Modules that are no layers of a UNet or a CLIP text encoder are carried along as foreign, as is what is no factor.

    Raises:
        CorruptError: A factor without its other half, shapes that do not fit, two names for one layer, or more than
            half of the modules unknown.
    """
    modules, embeddings, embeddings_2, foreign = _sorted_out(tensors)
    targets = {module: target_of_module(module) for module in modules}
    _check_known(targets)
    factors: dict[str, LoraFactors] = {}
    magnitudes: dict[str, Tensor] = {}
    for module, parts in modules.items():
        target = targets[module]
        found, magnitude, rest = (None, None, parts) if target is None else _read(module, parts)
        foreign |= {f"{module}.{suffix}": tensor for suffix, tensor in rest.items()}
        if target is None or found is None:
            continue
        if target in factors:
            raise CorruptError(module, f"is a second name for {target}, which the file has already", _FIX)
        factors[target] = found
        if magnitude is not None:
            magnitudes[target] = magnitude
    adapter = Adapter(factors, embeddings, {}, foreign, embeddings_2, magnitudes)
    return replace(adapter, provenance=provenance_of(metadata, facts(adapter, _family(adapter, metadata))))


def render(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of an adapter; `parse` gives the same adapter back.

    Raises:
        CorruptError: A layer that this format has no name for, or foreign tensors of another format.
    """
    family = _family(adapter, source_metadata(adapter))
    two_encoders = family == SDXL or _has_second_encoder(adapter)
    tensors: dict[str, Tensor] = {}
    for target, factors in adapter.factors.items():
        module = module_of_target(target, sgm=family == SDXL, two_encoders=two_encoders)
        if module is None:
            fix = "use --to native or --to diffusers, which write any name"
            raise CorruptError(target, "has no name in kohya's format", fix)
        tensors[f"{module}.{_DOWN}"], tensors[f"{module}.{_UP}"] = factors.down, factors.up
        tensors[f"{module}.{_ALPHA}"] = _alpha_tensor(factors)
        if target in adapter.magnitudes:
            tensors[f"{module}.{_MAGNITUDE}"] = adapter.magnitudes[target]
    for second, rows_by_token in enumerate((adapter.embeddings, adapter.embeddings_2)):
        for token, rows in rows_by_token.items():
            tensors[key_of_token(token, second=bool(second), two_encoders=two_encoders)] = rows
    for name, tensor in adapter.foreign.items():
        if not name.startswith(STARTS) or name in tensors:
            fix = "convert the adapter to the format it came from, or to native"
            raise CorruptError(name, "is a tensor of another format, which nobody here understands", fix)
        tensors[name] = tensor
    return tensors, metadata_of(adapter, facts(adapter, family))


def _family(adapter: Adapter, said: Mapping[str, str]) -> str | None:
    """By the layers, and where these leave it open, by whatever else can only be SDXL."""
    changes = {target: (factors.up.shape[0], *factors.down.shape[1:]) for target, factors in adapter.factors.items()}
    fitting = families(changes)
    if len(fitting) > 1 and SDXL in fitting and (_has_second_encoder(adapter) or says_sdxl(said)):
        return SDXL
    return fitting[0] if len(fitting) == 1 else None


def _has_second_encoder(adapter: Adapter) -> bool:
    return bool(adapter.embeddings_2) or any(target.startswith(root(TEXT_ENCODER_2)) for target in adapter.factors)


def _sorted_out(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of modules by module and suffix, rows by token for either text encoder, and the rest."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    embeddings: dict[str, Tensor] = {}
    embeddings_2: dict[str, Tensor] = {}
    foreign: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.partition(".")
        bundled = token_of_key(name)
        if bundled:
            token, second = bundled
            rows = embeddings_2 if second else embeddings
            if token in rows:
                raise CorruptError(name, f"is a second embedding of {token}", _FIX)
            rows[token] = tensor[None] if tensor.ndim == 1 else tensor
        elif name.startswith(PREFIXES) and suffix:
            modules[module][suffix] = tensor
        else:
            foreign[name] = tensor
    return modules, embeddings, embeddings_2, foreign


def _check_known(targets: Mapping[str, str | None]) -> None:
    unknown = sorted(module for module, target in targets.items() if target is None)
    if 2 * len(unknown) > len(targets):
        problem = f"{len(unknown)} of {len(targets)} modules are no layers of a Stable Diffusion: "
        problem += ", ".join(f"{module:.80}" for module in unknown[:3])
        raise CorruptError(unknown[0], problem, "give an adapter for SD 1.x, SD 2.x or SDXL")


def _read(module: str, parts: Mapping[str, Tensor]) -> tuple[LoraFactors | None, Tensor | None, dict[str, Tensor]]:
    """One module's factors, its DoRA magnitude, and by suffix what is neither."""
    try:
        return _module_factors(module, parts)
    except CorruptError as error:
        raise CorruptError(module, error.problem, error.fix) from None


def _module_factors(
    module: str, parts: Mapping[str, Tensor]
) -> tuple[LoraFactors | None, Tensor | None, dict[str, Tensor]]:
    rest = dict(parts)
    if _DOWN not in parts and _UP not in parts:
        return None, None, rest
    for half in (_DOWN, _UP):
        if half not in parts:
            raise CorruptError(module, f"has no {half}", _FIX)
    down, up = rest.pop(_DOWN), rest.pop(_UP)
    if _MID in rest:
        down = _folded(module, rest.pop(_MID), down)
        up = up[:, :, None, None] if up.ndim == 2 else up
    factors = LoraFactors(down, up, alpha=1.0)
    alpha = rest.pop(_ALPHA, torch.tensor(factors.rank))
    if alpha.numel() != 1:
        raise CorruptError(module, f"alpha is no single number, but of shape {tuple(alpha.shape)}", _FIX)
    return replace(factors, alpha=float(alpha)), None, rest


def _folded(module: str, mid: Tensor, down: Tensor) -> Tensor:
    """The kxk kernel that passing through `down` and then `mid` comes to, in float32."""
    fits = mid.ndim == 4 and down.ndim in (2, 4) and mid.shape[0] == mid.shape[1] == down.shape[0]
    if not fits or set(down.shape[2:]) - {1} or down.numel() * mid.shape[2:].numel() > _LARGEST:
        problem = f"mid {tuple(mid.shape)} and down {tuple(down.shape)} do not belong together"
        raise CorruptError(module, problem, _FIX)
    return torch.einsum("ijhw,jc->ichw", mid.float(), down.float().flatten(1))


def _alpha_tensor(factors: LoraFactors) -> Tensor:
    """In the factors' dtype, as kohya's scripts write it, unless that or float32 would round it."""
    alpha = torch.tensor(factors.alpha, dtype=torch.float64)
    kinds = (factors.down.dtype, torch.float32, torch.float64)
    return next(alpha.to(kind) for kind in kinds if alpha.to(kind).double() == alpha)
