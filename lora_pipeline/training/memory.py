"""What a run will need, told before it starts; refused where it cannot fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_pipeline.errors import ResourceError

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams

# Values an optimiser keeps of each that learns; 2 where nothing is known.
_KEPT = {"adamw": 2.0, "adamw8bit": 0.5, "adafactor": 0.1, "prodigy": 4.0, "lion": 1.0}
_FLOAT = 4
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Args:
        base: Of the models' weights, which are there already.
        activations: Kept for the backward pass of one batch.
        learning: Gradients, the optimiser's moments and the average, of everything that learns.
    """

    base: int
    activations: int
    learning: int

    @property
    def more(self) -> int:
        """What is not there yet."""
        return self.activations + self.learning


def learning_bytes(params: TrainParams, count: int) -> int:
    """Bytes that `count` learning values need beside themselves, with gradients; as many as a checkpoint of them has.

    A checkpoint has the values, and no gradients.
    """
    kept = _KEPT.get(params.optimiser.name, 2.0) + (params.optimiser.ema is not None)
    return round(count * _FLOAT * (1.0 + kept))


def activation_bytes(forward: Callable[[int], object], batch: int) -> int:
    """Bytes that a forward pass keeps for its backward pass, found without computing anything.

    Args:
        forward: Makes so many examples of no content, and passes them through the network.
        batch: Examples.
    """
    one, two = (_saved(forward, count) for count in (1, 2))
    return (two - one) * batch  # the difference leaves out weights, which are saved too


def _saved(forward: Callable[[int], object], batch: int) -> int:
    sizes: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        alive.append(storage)  # its address must not be given to another
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        forward(batch)
    return sum(sizes.values())


def available_bytes(device: torch.device) -> int:
    """Free memory of the device, or of this machine or its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        return free if limit == "max" else min(free, int(limit) - int(used) + int(cache))
    except (OSError, KeyError, ValueError):
        return free


def used_bytes() -> int:
    """Memory this process has: of the GPU where there is one."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def check_memory(needs: Needs, available: int, params: TrainParams, say: Callable[[str], None]) -> None:
    """Tells what is needed.

    Raises:
        ResourceError: More than is available; names the two values that would help most.
    """
    parts = f"base {_told(needs.base)}, activations {_told(needs.activations)}, what learns {_told(needs.learning)}"
    if needs.more <= available:
        say(f"memory: {parts}; {_told(available)} available")
        return
    best = sorted(_savings(needs, params).items(), key=lambda each: -each[1])[:2]
    fix = ", or ".join(f"{key} saves about {_told(saved)}" for key, saved in best) or "use a machine with more"
    problem = f"{_told(needs.more)} are needed beside the base, and {_told(available)} are available ({parts})"
    raise ResourceError("memory", problem, fix)


def _savings(needs: Needs, params: TrainParams) -> Mapping[str, int]:
    """Bytes saved by values of params.yaml."""
    savings: dict[str, int] = {}
    if params.batch_size > 1:
        smaller = max(1, params.batch_size // 2)
        savings[f"batch_size: {smaller}"] = needs.activations * (params.batch_size - smaller) // params.batch_size
    if not params.engine.gradient_checkpointing:
        savings["engine.gradient_checkpointing: true"] = needs.activations * 2 // 3
    if params.engine.precision == "float32":
        savings["engine.precision: bfloat16"] = (needs.base + needs.activations) // 2
    if (kept := _KEPT.get(params.optimiser.name, 2.0)) > 1:
        rest = 1.0 + kept + (params.optimiser.ema is not None)
        savings["optimiser.name: adafactor"] = round(needs.learning * (kept - _KEPT["adafactor"]) / rest)
    return {key: saved for key, saved in savings.items() if saved > 0}


def weight_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes of the models' weights."""
    return sum(each.numel() * each.element_size() for model in models for each in model.parameters())


def _told(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
