"""Training the judge: one loss for all its answers, on drawings and on their reconstructions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_pipeline.toyworld.fitting import Recipe, Report, fit, load_weights, plain, step_generator
from lora_pipeline.toyworld.judge import Answers, Judge, blank_judge, load_judge, save_judge, to_tensor
from lora_pipeline.toyworld.judge_card import FRESH, card, measure
from lora_pipeline.toyworld.judge_pool import Counts, Pool, Reconstruct, gather
from lora_pipeline.toyworld.labels import UNTOLD, Labels, cell_targets
from lora_pipeline.toyworld.scene import SIDE

JUDGE_RECIPE = Recipe(steps=4500, batch=64, peak=2e-3, seed=0, weight_decay=0.02)
JUDGE_COUNTS = Counts(world=50_000, composites=30_000, stickers=10_000, flats=10_000)
RECONSTRUCTED = 0.25  # of a batch
CORE_WEIGHT = 4
BLUR, NOISE = 0.7, 0.04


def train_judge(  # noqa: PLR0913 - a command hands its options over
    work: Path, out: Path, vae: Reconstruct | None, report: Report,
    recipe: Recipe = JUDGE_RECIPE, counts: Counts = JUDGE_COUNTS, fresh: int = FRESH, workers: int = 1,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Train a judge and write it with its card into the folder `out`; what resuming needs is kept in `work`.

    Args:
        work: Folder of the checkpoint and of the reconstructions.
        out: Gets `model.safetensors`, `config.json` and `JUDGE_CARD.md`.
        vae: Takes uint8 (n, 64, 64, 3) pictures through the base's autoencoder and back; None = read drawings only.
        report: Called after each step with its number and loss.
        recipe: Steps, batch, learning rate, seed.
        counts: How many drawings to learn from.
        fresh: How many new pictures each table of the card is measured on.
        workers: Processes that draw.

    Returns:
        What the card says: table name to row name to a share in [0, 1].
    """
    work.mkdir(parents=True, exist_ok=True)
    judge = blank_judge(recipe.seed)
    fit_judge(judge, gather(work, vae, counts, recipe.seed, workers), recipe, work / "judge.ckpt", report)
    save_judge(judge, out)
    measured = measure(load_judge(out), vae, recipe.seed, fresh)
    (out / "JUDGE_CARD.md").write_text(card(measured, recipe, counts))
    return measured


def mirrored(images: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
    """The pictures and their labels, left and right swapped."""
    places = labels.places.copy()
    places[:, :, 0] = SIDE - places[:, :, 0]
    return images.flip(-1), replace(labels, places=places)


def loss_of(answers: Answers, labels: Labels) -> Tensor:
    """The sum of every head's mean cross-entropy, untold answers left out, and of the grid's."""
    total = torch.zeros(())
    for name, logits in answers.heads.items():
        total = total + told_cross_entropy(logits, torch.from_numpy(labels.heads[name]))
    core, cells = cell_targets(labels)
    total = total + CORE_WEIGHT * F.binary_cross_entropy_with_logits(answers.core, core)
    for name, logits in answers.cells.items():
        total = total + told_cross_entropy(logits, cells[name])
    return total


def told_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy of (n, classes, ...) logits over the answers that are told; 0 where none is."""
    told = (classes != UNTOLD).sum().clamp_min(1)
    return F.cross_entropy(logits, classes, ignore_index=UNTOLD, reduction="sum") / told


def degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures blurred by a random amount and a little noisy: drawings are sharper than anything a model paints."""
    amount = torch.rand(len(images), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(images.shape, generator=generator)
    return torch.lerp(images, blurred, BLUR * amount) + NOISE * amount * noise


def fit_judge(judge: Judge, pool: Pool, recipe: Recipe, checkpoint: Path, report: Report) -> None:
    """Fit `judge` to `pool`, resuming from `checkpoint`; it ends with its averaged weights."""
    rebuilt = round(recipe.batch * RECONSTRUCTED) if len(pool.rebuilt) else 0

    def loss_at(step: int) -> Tensor:
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(pool.drawn), (recipe.batch - rebuilt,), generator=generator).sort().values.numpy()
        images, labels = degraded(to_tensor(pool.drawn[rows]), generator), pool.drawn_labels.rows(rows)
        if rebuilt:
            rows = torch.randint(len(pool.rebuilt), (rebuilt,), generator=generator).sort().values.numpy()
            images = torch.cat([images, to_tensor(pool.rebuilt[rows])])
            labels = labels.joined(pool.rebuilt_labels.rows(rows))
        if step % 2:
            images, labels = mirrored(images, labels)
        return loss_of(judge(images), labels)

    load_weights(judge, fit(judge, plain(loss_at), recipe, checkpoint, report).weights)
