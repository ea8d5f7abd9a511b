"""The format of kohya's scripts, which AUTOMATIC1111, ComfyUI and most published files use.

Tensors: `<module>.lora_down.weight` (rank, in[, height, width]), `<module>.lora_up.weight` (out, rank[, 1, 1]),
`<module>.alpha` (one number; the rank where it is missing), a DoRA's `<module>.dora_scale`. Other kinds of modules are
read as `lycoris` says, and written as these. `kohya_names` says what modules are called.
Bundled embeddings: `bundle_emb.<token>.emb_params` or `.string_to_param.*`, and for SDXL `.clip_l` and `.clip_g`.
Metadata: see `kohya_metadata`. Facts of https://github.com/kohya-ss/sd-scripts (`networks/lora.py`) and of
https://github.com/AUTOMATIC1111/stable-diffusion-webui (`extensions-builtin/Lora`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats.kohya_metadata import facts, metadata_of, provenance_of, says_sdxl, source_metadata
from lora_pipeline.adapters.formats.lycoris import module_factors
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

_DOWN, _UP, _ALPHA, _MAGNITUDE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
_FIX = "get the file again"


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads the adapter out of a file's tensors and metadata.

    Modules that are no layers of a UNet or a CLIP text encoder are carried along as foreign, as is what is no factor.

    Raises:
        CorruptError: A factor without its other half, shapes that do not fit, two names for one layer, or more than
            half of the modules unknown.
    """
    modules, embeddings, embeddings_2, foreign = _sorted_out(tensors)
    factors: dict[str, LoraFactors] = {}
    magnitudes: dict[str, Tensor] = {}
    for module, target in _targets(modules).items():
        found, magnitude, rest = _read(module, target, modules[module])
        foreign |= {f"{module}.{suffix}": tensor for suffix, tensor in rest.items()}
        if target and found:
            factors[target] = found
        if target and magnitude is not None:
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
    modules = {target: _module(target, family == SDXL, two_encoders) for target in adapter.factors}
    tensors: dict[str, Tensor] = {}
    for target, factors in adapter.factors.items():
        module = modules[target]
        tensors[f"{module}.{_DOWN}"], tensors[f"{module}.{_UP}"] = factors.down, factors.up
        tensors[f"{module}.{_ALPHA}"] = _alpha_tensor(factors)
        if target in adapter.magnitudes:
            tensors[f"{module}.{_MAGNITUDE}"] = adapter.magnitudes[target]
    for second, rows_by_token in enumerate((adapter.embeddings, adapter.embeddings_2)):
        for token, rows in rows_by_token.items():
            tensors[key_of_token(token, second=bool(second), two_encoders=two_encoders)] = rows
    for name, tensor in adapter.foreign.items():
        key = _key_of_foreign(name, modules)
        if not key.startswith(STARTS) or key in tensors:
            fix = "convert the adapter to the format it came from, or to native"
            raise CorruptError(name, "is a tensor of another format, which nobody here understands", fix)
        tensors[key] = tensor
    return tensors, metadata_of(adapter, facts(adapter, family))


def _module(target: str, sgm: bool, two_encoders: bool) -> str:
    module = module_of_target(target, sgm=sgm, two_encoders=two_encoders)
    if module is None:
        fix = "use --to native or --to diffusers, which write any name"
        raise CorruptError(target, "has no name in kohya's format", fix)
    return module


def _key_of_foreign(name: str, modules: Mapping[str, str]) -> str:
    """What a module had beside its factors stays beside them, should the module change its name."""
    module, dot, suffix = name.partition(".")
    return modules.get(target_of_module(module) or "", module) + dot + suffix


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


def _targets(modules: Collection[str]) -> dict[str, str | None]:
    """The target of each module, None for what is no layer.

    Raises:
        CorruptError: More than half are none, or two are one layer.
    """
    targets = {module: target_of_module(module) for module in modules}
    unknown = sorted(module for module, target in targets.items() if target is None)
    if 2 * len(unknown) > len(targets):
        problem = f"{len(unknown)} of {len(targets)} modules are no layers of a Stable Diffusion: "
        problem += ", ".join(f"{module:.80}" for module in unknown[:3])
        raise CorruptError(unknown[0], problem, "give an adapter for SD 1.x, SD 2.x or SDXL")
    first: dict[str, str] = {}
    for module, target in targets.items():
        if target and first.setdefault(target, module) != module:
            raise CorruptError(module, f"is a second name for {target}, beside {first[target]}", _FIX)
    return targets


def _read(
    module: str, target: str | None, parts: Mapping[str, Tensor]
) -> tuple[LoraFactors | None, Tensor | None, dict[str, Tensor]]:
    """One module's factors, its DoRA magnitude, and by suffix what is neither."""
    if target is None:
        return None, None, dict(parts)
    try:
        return module_factors(target, parts)
    except CorruptError as error:
        raise CorruptError(module, error.problem, error.fix) from None


def _alpha_tensor(factors: LoraFactors) -> Tensor:
    """In the factors' dtype, as kohya's scripts write it, unless that or float32 would round it."""
    alpha = torch.tensor(factors.alpha, dtype=torch.float64)
    kinds = (factors.down.dtype, torch.float32, torch.float64)
    return next(alpha.to(kind) for kind in kinds if alpha.to(kind).double() == alpha)
