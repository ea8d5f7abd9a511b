"""How well the judge reads fresh pictures, and the card that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lora_pipeline.toyworld.captions import prompt
from lora_pipeline.toyworld.drawing import draw
from lora_pipeline.toyworld.expectation import expectation
from lora_pipeline.toyworld.fitting import Recipe
from lora_pipeline.toyworld.judge import HEADS, PARTS, Judge, answers
from lora_pipeline.toyworld.judge_pool import Counts, Reconstruct, own, reconstructed, streamed
from lora_pipeline.toyworld.labels import UNTOLD, label
from lora_pipeline.toyworld.scene import MASCOTS, Scene, mascot_scene
from lora_pipeline.toyworld.scoring import TWO_OBJECTS, JudgeScorer, both_objects, readings, score_drawings

FRESH = 1500  # pictures a row of the card is measured on
FRESH_SEED = 1  # of the judge's own sources, which it learned from under the recipe's seed + 0
PORTRAITS = 40
MASCOT_STREAM = 7

Table = dict[str, float]


def accuracy(judge: Judge, scenes: Sequence[Scene], images: np.ndarray) -> Table:
    """Head or part to the share of right answers, in [0, 1], where the picture tells; `objects`: the strict rule."""
    truth = label(scenes).heads
    told = answers(judge, images).heads
    shares: Table = {}
    for name in HEADS | PARTS:
        known = truth[name] != UNTOLD
        if known.any():
            shares[name] = float((told[name].argmax(1).numpy() == truth[name])[known].mean())
    pairs = [row for row, scene in enumerate(scenes) if scene.relation]
    if pairs:
        asked = [expectation(prompt(scenes[row])) for row in pairs]
        shares[TWO_OBJECTS] = float(np.mean(list(map(both_objects, readings(judge, images[pairs]), asked))))
    return shares


def portraits(name: str, count: int, seed: int) -> np.ndarray:
    """Fresh drawings of a mascot: uint8 (count, 64, 64, 3)."""
    drawn = []
    for index in range(count):
        rng = np.random.default_rng([seed, MASCOT_STREAM, index])
        drawn.append(np.asarray(draw(mascot_scene(rng, name), rng)))
    return np.stack(drawn)


def likeness(judge: Judge, seed: int) -> Table:
    """Mean cosines of identity: each mascot with itself in other pictures, with the other, and with any creatures."""
    scorer = JudgeScorer(judge)
    vectors = {name: scorer.identity(portraits(name, PORTRAITS, seed)) for name in MASCOTS}
    vectors["any creature"] = scorer.identity(own("flats", PORTRAITS, seed + FRESH_SEED)[1])
    table: Table = {}
    names = list(vectors)
    for i, first in enumerate(names):
        for second in names[i:]:
            cosines = vectors[first] @ vectors[second].T
            if first == second:
                cosines = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
            table[f"{first}, {second}"] = float(cosines.mean())
    return table


def measure(judge: Judge, vae: Reconstruct | None, seed: int, count: int = FRESH) -> dict[str, Table]:
    """Every table of the card. Reconstructions are left out without a `vae`."""
    fresh = {
        "world": streamed("fresh-world", count, seed),
        "creatures": streamed("fresh-composites", count, seed),
        "stickers": own("stickers", count // 3, seed + FRESH_SEED),
    }
    tables = {f"{name}, drawn": accuracy(judge, *pictures) for name, pictures in fresh.items()}
    if vae:
        for name, (scenes, pixels) in fresh.items():
            tables[f"{name}, rebuilt"] = accuracy(judge, scenes, reconstructed(pixels, vae))
        tables["prompts, rebuilt"] = score_drawings(
            judge, count // 3, seed, through=lambda drawn: reconstructed(drawn, vae)
        )
    tables["prompts, drawn"] = score_drawings(judge, count // 3, seed)
    tables["likeness"] = likeness(judge, seed)
    return tables


def card(tables: Mapping[str, Table], recipe: Recipe, counts: Counts) -> str:
    """The Markdown of JUDGE_CARD.md."""
    columns = [name for name in tables if name != "likeness"]
    rows = [name for name in (*HEADS, TWO_OBJECTS, *PARTS) if any(name in tables[column] for column in columns)]
    lines = [
        "# The judge of the toy world",
        "",
        "A small network that reads a 64 x 64 toy picture: its attributes, the parts of a creature, and its objects",
        "on a 16 x 16 grid. Trained from nothing on drawings made here; it has seen the held-out style and the parts",
        "of the held-out subjects, never the subjects as classes. It knows this world only, and says something about",
        "any picture, a bad one too.",
        "",
        f"Trained on {counts.world} scenes of the world, {counts.composites} creatures of any parts, {counts.stickers}",
        f"stickers and {counts.flats} flat creatures, some as the base's autoencoder shows them, with",
        f"{recipe.steps} steps of {recipe.batch} pictures, seed {recipe.seed}. Rebuild it with `lora-pipe base judge`.",
        "",
        "## Right answers on fresh pictures, %",
        "",
        "`rebuilt` = through the base's autoencoder and back. `objects` = the strict two-object rule. `prompts` = held",
        "against the words of prompts, as a base is scored.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [f"{100 * tables[column][row]:.1f}" if row in tables[column] else "" for column in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", "## Likeness: mean cosine of identity", "", "| pictures of | cosine |", "|---|---|"]
    lines += [f"| {pair} | {cosine:.3f} |" for pair, cosine in tables["likeness"].items()]
    return "\n".join(lines) + "\n"
