"""What the embedded base can do, as a table and as its MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path

from lora_pipeline.toyworld.base import RECIPE

# Shares that a base must reach to be worth publishing.
BARS = {"colour": 0.95, "background": 0.95, "kind": 0.85, "style": 0.85, "objects": 0.50}
NAMES = {"kind": "shape", "objects": "both objects of a two-object prompt"}

Scores = dict[str, dict[str, float]]


def table(scores: Scores) -> str:
    """A Markdown table of percentages: what the base paints, beside the judge's own ceilings."""
    lines = [
        "| asked for | painted | bar | the autoencoder's ceiling | real drawings |",
        "|---|---|---|---|---|",
    ]
    for name in scores["painted"]:
        bar = f"{100 * BARS[name]:.0f}" if name in BARS else ""
        row = [f"{100 * scores[column][name]:.1f}" for column in ("painted", "rebuilt", "drawn")]
        lines.append(f"| {NAMES.get(name, name)} | {row[0]} | {bar} | {row[1]} | {row[2]} |")
    return "\n".join(lines)


def missed(scores: Scores) -> list[str]:
    """The attributes whose painted share is below its bar."""
    return [name for name, bar in BARS.items() if scores["painted"][name] < bar]


def write_card(base: Path, scores: Scores, count: int, seed: int) -> None:
    """Write MODEL_CARD.md into the folder `base`."""
    short = ", ".join(NAMES.get(name, name) for name in missed(scores))
    verdict = f"Below its bar: {short}." if short else "Every bar is reached."
    legs = " and then ".join(f"{leg.steps:,} steps of {leg.batch}" for leg in RECIPE.denoiser)
    pictures = sum(leg.steps * leg.batch for leg in RECIPE.denoiser)
    (base / "MODEL_CARD.md").write_text(
        f"""# The embedded base: a tiny Stable Diffusion of a drawn world

A `StableDiffusionPipeline` for 64 x 64 pictures, trained from nothing on drawings that this project makes. It exists so
that everything here can be run and measured without a network, an account or a GPU. It knows one small world: shapes
and creatures in eight colours, on plain and scenic backgrounds, in four drawing styles, alone or in pairs.

Prompts it was taught read like `a flat drawing of a large striped red star on a beach` and
`an outline drawing of a blue cat left of a red heart on a meadow`. It has never painted the two mascots (two-tone
creatures) or the sticker style: those are left for users to teach.

## How often it paints what {count} random prompts ask, %

DDIM, 20 steps, guidance 3, judged by `models/judge` (`lora-pipe base score --count {count} --seed {seed}`). {verdict}
A creature has a colour only if each of its parts has.

{table(scores)}

## How it was made

`lora-pipe base train` rebuilds it from seeds: {RECIPE.autoencoder.steps:,} steps of {RECIPE.autoencoder.batch} pictures
for the autoencoder, then {legs} ({pictures:,} pictures)
for the text encoder and the UNet together: v-prediction, zero terminal signal, Muon, an average of the weights. It
resumes where it was stopped. Bytes depend on the machine and on torch's version; what it can do does not.

Licence: Apache-2.0, like the code. The training pictures are drawn by `lora_pipeline/toyworld/drawing.py`; nobody's
work is in it.
""",
        encoding="utf-8",
    )
