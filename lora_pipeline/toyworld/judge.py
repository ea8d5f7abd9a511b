"""The judge: one small network that reads a toy picture back into words.

It answers in classes (`HEADS`), names the parts of a creature (`PARTS`), and finds objects on a 16 x 16 grid, so that a
picture with two of them can be held to a strict rule. Its embeddings are made of its own answers: the square roots of
class probabilities, joined and scaled to unit length. The cosine of two such vectors is the mean Bhattacharyya
coefficient of their heads: for identity, the share of a creature's six parts that two pictures have in common.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lora_pipeline.errors import CorruptError, MissingError
from lora_pipeline.pretrained.threads import settle_threads
from lora_pipeline.toyworld.scene import BACKGROUNDS, COLOURS, HELD_OUT_STYLE, KINDS, SIZES, STYLES, TEXTURES

GRID = 16
FINE, DEEP, HIDDEN = 48, 96, 192
BATCH = 100
FIX = "train one with: lora-pipe base judge"

PALETTE = (*COLOURS, "pink")
HEADS = {
    "kind": (*KINDS, "creature"),
    "colour": (*COLOURS, "composite"),
    "background": BACKGROUNDS,
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "style": (*STYLES, HELD_OUT_STYLE),
    "count": ("one", "two"),
}
PARTS = {
    "body": ("none", "round", "square", "egg"),
    "ears": ("none", "pointed", "antenna", "long", "round"),
    "eyes": ("none", "1", "2", "3"),
    "top": PALETTE,
    "bottom": ("none", *PALETTE),
    "ear": ("none", *PALETTE),
}
CELLS = {"kind": HEADS["kind"], "colour": HEADS["colour"]}


@dataclass(frozen=True)
class Answers:
    """Logits.

    `heads`: name to (n, classes), for every head and part; `core`: (n, 16, 16), the middles of objects; `cells`: name
    to (n, classes, 16, 16), what the object at a cell is.
    """

    heads: dict[str, Tensor]
    core: Tensor
    cells: dict[str, Tensor]


class Residual(nn.Module):
    """Two normalised 3x3 convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to the same."""
        hidden = self.conv_in(F.relu(self.norm_in(x)))
        change: Tensor = self.conv_out(F.relu(self.norm_out(hidden)))
        return x + change


class Judge(nn.Module):
    """Pictures (n, 3, 64, 64) in [-1, 1] to `Answers`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, stride=2, padding=2)
        self.fine = nn.Sequential(nn.Conv2d(32, FINE, 3, stride=2, padding=1), Residual(FINE))
        self.deep = nn.Sequential(nn.Conv2d(FINE, DEEP, 3, stride=2, padding=1), Residual(DEEP), Residual(DEEP))
        self.lateral = nn.Conv2d(DEEP, FINE, 1)
        self.fuse = nn.Sequential(nn.GroupNorm(8, FINE), nn.ReLU(), nn.Conv2d(FINE, FINE, 3, padding=1), nn.ReLU())
        self.core = nn.Conv2d(FINE, 1, 1)
        self.cells = nn.ModuleDict({name: nn.Conv2d(FINE, len(classes), 1) for name, classes in CELLS.items()})
        self.gather = nn.Sequential(nn.Linear(DEEP + DEEP + FINE, HIDDEN), nn.ReLU())
        self.heads = nn.ModuleDict({n: nn.Linear(HIDDEN, len(c)) for n, c in (HEADS | PARTS).items()})

    def forward(self, images: Tensor) -> Answers:
        """Logits for float32 pictures (n, 3, 64, 64) in [-1, 1]."""
        images = images.contiguous(memory_format=torch.channels_last)
        fine = self.fine(F.relu(self.stem(images)))
        deep = self.deep(fine)
        fused = self.fuse(fine + F.interpolate(self.lateral(deep), scale_factor=2, mode="nearest"))
        core = self.core(fused)
        weight = core.detach().sigmoid() + 1e-4
        seen = [deep.mean((2, 3)), pooled(deep, F.avg_pool2d(weight, 2)), pooled(fused, weight)]
        hidden = self.gather(torch.cat(seen, 1))
        return Answers(
            {name: head(hidden) for name, head in self.heads.items()},
            core[:, 0],
            {name: head(fused) for name, head in self.cells.items()},
        )


def blank_judge(seed: int) -> Judge:
    """An untrained judge, its weights drawn from `seed`."""
    judge = Judge()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in judge.named_parameters():
        if weight.ndim > 1:
            nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    return judge


def pooled(features: Tensor, weight: Tensor) -> Tensor:
    """The mean of (n, c, h, w) features under a positive (n, 1, h, w) weight: (n, c)."""
    return (features * weight).sum((2, 3)) / weight.sum((2, 3))


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (n, 64, 64, 3) to float32 (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1


@torch.no_grad()
def answers(judge: Judge, images: np.ndarray) -> Answers:
    """The judge's answers on uint8 (n, 64, 64, 3) pictures, in batches."""
    read = [judge(batch) for batch in torch.split(to_tensor(images), BATCH)]
    return Answers(
        {name: torch.cat([part.heads[name] for part in read]) for name in HEADS | PARTS},
        torch.cat([part.core for part in read]),
        {name: torch.cat([part.cells[name] for part in read]) for name in CELLS},
    )


def embedding(read: Answers, names: list[str]) -> Tensor:
    """Unit vectors (n, d): the square roots of the named heads' probabilities, each head weighing the same."""
    roots = [read.heads[name].softmax(1).sqrt() for name in names]
    return F.normalize(torch.cat(roots, 1), dim=1)


def save_judge(judge: Judge, folder: Path) -> None:
    """Write `model.safetensors` (float16) and `config.json` (the classes, in order) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().half().contiguous() for name, weight in judge.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(), indent=1) + "\n")


def config() -> dict[str, object]:
    """What `config.json` says of a judge: the grid, and the classes in order."""
    return {"format": "lora-pipeline judge", "version": 1, "grid": GRID, "classes": HEADS | PARTS}


def load_judge(folder: Path) -> Judge:
    """The judge kept in `folder`, float32 and frozen.

    Raises:
        MissingError: there is no judge.
        CorruptError: its classes are not this world's, or its weights do not fit or are not finite.
    """
    weights = folder / "model.safetensors"
    for path in (folder / "config.json", weights):
        if not path.is_file():
            raise MissingError(str(path), "there is no such file", FIX)
    try:
        told = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise CorruptError(str(folder / "config.json"), f"is not JSON: {error}", FIX) from error
    if told != json.loads(json.dumps(config())):
        raise CorruptError(str(folder / "config.json"), "describes a judge of another world", FIX)
    judge = Judge()
    try:
        judge.load_state_dict({name: weight.float() for name, weight in load_file(weights).items()})
    except (SafetensorError, RuntimeError) as error:
        raise CorruptError(str(weights), f"does not hold this judge's weights: {error}", FIX) from error
    if not all(weight.isfinite().all() for weight in judge.parameters()):
        raise CorruptError(str(weights), "holds numbers that are not finite", FIX)
    settle_threads(judge)
    return judge.eval().requires_grad_(False)
