"""The price of adapters and of changing their weights, beside diffusers and PEFT: `python -m benchmarks.render`.

With `--json` as JSON. A run is a UNet's calls for the steps of a sampler, two pictures at once as guidance wants them.
Every side has a UNet of its own with the same weights and adapters, and they take turns; times are those of the fastest
round. The UNets are the embedded one and one of a tenth of Stable Diffusion 1.5's widths; with `--sd15` one of its true
sizes, at 256 x 256 pixels.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row, show

if TYPE_CHECKING:
    from torch import Tensor

    from lora_pipeline.adapters.lora import LoraFactors
    from lora_pipeline.pretrained.components import Components

STEPS, SEGMENTS, ROUNDS, RANK = 20, 3, 7, 16
GLOBS = ("*attn*.to_q", "*attn*.to_k", "*attn*.to_v", "*attn*.to_out.0")
CONSTANT, FEW, EVERY = "constant weights", f"{SEGMENTS} segments", "a change every step"
Prepare = Callable[[int], None]
Adapters = Mapping[str, Mapping[str, "LoraFactors"]]


def weights_at(kind: str, step: int, index: int) -> float:
    """The weight of adapter `index` in a step."""
    if kind == CONSTANT:
        return 0.8
    place = step * SEGMENTS // STEPS if kind == FEW else step
    return 0.2 + 0.6 * ((place + index) % STEPS) / STEPS


def made(unet: Any, count: int) -> Adapters:
    """Random adapters of the attentions' projections."""
    import torch

    from lora_pipeline.adapters.lora import LoraFactors
    from lora_pipeline.injection import inject

    source = torch.Generator().manual_seed(0)
    targets = inject.select_targets(unet, "unet", GLOBS)
    adapters: dict[str, dict[str, LoraFactors]] = {}
    for number in range(count):
        own = adapters.setdefault(f"a{number}", {})
        for target in targets:
            weight = unet.get_submodule(target.removeprefix("unet.")).weight
            rank = min(RANK, *weight.shape)
            down = torch.randn(rank, weight.shape[1], generator=source) / weight.shape[1]
            own[target] = LoraFactors(down, torch.randn(weight.shape[0], rank, generator=source) / rank, float(rank))
    return adapters


@contextmanager
def ours(components: Components, adapters: Adapters, kind: str) -> Iterator[Prepare]:
    """Our executor of choice."""
    from lora_pipeline.adapters.adapter import Adapter
    from lora_pipeline.injection import inject
    from lora_pipeline.rendering.schedule import schedule
    from lora_pipeline.rendering.weighting import weighted

    whole = {name: Adapter(factors) for name, factors in adapters.items()}
    for name, adapter in whole.items():
        inject.inject_adapter(components.unet, "unet", adapter, name)
    schedules = {
        name: schedule([(step / (STEPS - 1), weights_at(kind, step, index)) for step in range(STEPS)], between="hold")
        for index, name in enumerate(adapters)
    }
    with weighted(components, whole, schedules, STEPS) as weighting:
        yield lambda step: weighting.use(weighting.steps[step][0][0])


def with_peft(unet: Any, adapters: Adapters) -> None:
    """The same adapters as PEFT's."""
    import peft

    for name, factors in adapters.items():
        ranks = {target.removeprefix("unet."): each.rank for target, each in factors.items()}
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(ranks)
        )
        unet.add_adapter(config, name)
        for path, each in zip(ranks, factors.values(), strict=True):
            layer = unet.get_submodule(path)
            layer.lora_A[name].weight.data.copy_(each.down)
            layer.lora_B[name].weight.data.copy_(each.up)


@contextmanager
def unfused(components: Components, adapters: Adapters, kind: str) -> Iterator[Prepare]:
    """Diffusers' `set_adapters` before each step whose weights differ, as its callbacks do."""
    unet: Any = components.unet
    with_peft(unet, adapters)
    names, now = list(adapters), [None]

    def prepare(step: int) -> None:
        weights = [weights_at(kind, step, index) for index in range(len(names))]
        if weights != now[0]:
            unet.set_adapters(names, weights)
            now[0] = weights  # type: ignore[call-overload]

    yield prepare


@contextmanager
def fused(components: Components, adapters: Adapters, kind: str) -> Iterator[Prepare]:
    """Diffusers' `fuse_lora` and `unfuse_lora` wherever weights differ."""
    unet: Any = components.unet
    with_peft(unet, adapters)
    names, now = list(adapters), [None]

    def prepare(step: int) -> None:
        weights = [weights_at(kind, step, index) for index in range(len(names))]
        if weights == now[0]:
            return
        if now[0] is not None:
            unet.unfuse_lora()
        unet.set_adapters(names, weights)
        unet.fuse_lora()
        now[0] = weights  # type: ignore[call-overload]

    yield prepare


@contextmanager
def bare(components: Components, adapters: Adapters, kind: str) -> Iterator[Prepare]:
    """No adapter."""
    del components, adapters, kind
    yield lambda _: None


SIDES: Mapping[str, Callable[[Any, Adapters, str], Any]] = {
    "no adapter": bare, "ours": ours, "PEFT unfused": unfused, "diffusers fuse": fused,
}  # fmt: skip


def inputs_of(components: Components) -> tuple[Tensor, Tensor]:
    """Latents and prompts of a picture with guidance."""
    import torch

    config = components.unet.config
    source = torch.Generator().manual_seed(1)
    side = config.sample_size
    latents = torch.randn(2, config.in_channels, side, side, generator=source)
    length: int = components.tokenizer.model_max_length
    return latents, torch.randn(2, length, config.cross_attention_dim, generator=source)


def measured(components: Components, count: int, kind: str) -> tuple[dict[str, float], float]:
    """Seconds of each side's fastest run, and the largest relative difference of their last predictions."""
    import torch

    adapters = made(components.unet, count)
    latents, states = inputs_of(components)
    times = dict.fromkeys(SIDES, float("inf"))
    said: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        runs = {}
        for name, side in SIDES.items():
            own = replace(components, unet=copy.deepcopy(components.unet))
            runs[name] = (own.unet, stack.enter_context(side(own, adapters, kind)))
        for _ in range(ROUNDS):
            for name, (unet, prepare) in runs.items():
                start = time.perf_counter()
                for step in range(STEPS):
                    prepare(step)
                    said[name] = unet(latents, 500, states).sample
                times[name] = min(times[name], time.perf_counter() - start)
    truth = said["ours"]
    others = [said[name] for name in SIDES if name not in ("ours", "no adapter")]
    return times, max(float((each - truth).norm() / truth.norm()) for each in others)


def rows_of(name: str, components: Components, counts: Sequence[int]) -> list[Row]:
    """Each kind of schedule with each number of adapters."""
    rows = []
    for count in counts:
        for kind, limit in ((CONSTANT, 0.01), (FEW, 0.01), (EVERY, 0.05)):
            times, apart = measured(components, count, kind)
            what = f"{name}, {count} adapters, {kind}: s for {STEPS} steps"
            over = times["ours"] / times["no adapter"] - 1.0
            rows.append(
                Row(
                    f"{what}, against no adapter (overhead)",
                    times["ours"],
                    times["no adapter"],
                    over,
                    limit,
                    over <= limit,
                )
            )
            for peer in ("PEFT unfused", "diffusers fuse"):
                ratio = times[peer] / times["ours"]
                told = f"{what}, against {peer}; they differ by {apart:.1g}"
                rows.append(Row(told, times["ours"], times[peer], ratio, 1.0, ratio >= 1.0))
    return rows


def rows(sd15: bool) -> list[Row]:
    """The rows of this benchmark."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from benchmarks import bases

    warnings.simplefilter("ignore")
    with TemporaryDirectory() as folder:
        if sd15:
            base = bases.make_base("sd15", Path(folder))
            base.unet.register_to_config(sample_size=32)
            return rows_of("sd15 at 256 x 256", base, (1, 2, 4))
        found = []
        for name in ("embedded", "tenth"):
            (Path(folder) / name).mkdir()
            found += rows_of(name, bases.make_base(name, Path(folder) / name), (1, 2, 4))
        return found


if __name__ == "__main__":
    show(rows("--sd15" in sys.argv), sys.argv)
