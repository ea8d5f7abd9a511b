"""A study's cells: a subject learnt by a method from a seed, painted, and scored; and what it is held against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lora_pipeline.adapters.fingerprint import base_fingerprint
from lora_pipeline.data.dataset import Example, read_examples, write_metadata
from lora_pipeline.data.images import open_picture
from lora_pipeline.data.preprocessing import preprocess
from lora_pipeline.errors import ParamsError
from lora_pipeline.evaluation.measures import diversity, drift, likeness
from lora_pipeline.evaluation.scorer import Scorer
from lora_pipeline.keeping import content_key
from lora_pipeline.params import ConceptParams, PriorsParams, TrainParams
from lora_pipeline.pretrained.adapted import add_adapter
from lora_pipeline.pretrained.components import Components, load_components
from lora_pipeline.rendering.sampling import pictures_at_once, sample
from lora_pipeline.toyworld.captions import place_words
from lora_pipeline.toyworld.drawing import draw
from lora_pipeline.toyworld.judge import load_judge
from lora_pipeline.toyworld.scene import SCENERY, mascot_scene
from lora_pipeline.toyworld.scoring import JudgeScorer
from lora_pipeline.training.tuning import Task, Tuned, private, tune

MODEL = "zorp"  # the concept of params.yaml whose section all subjects are learnt by
BACKGROUNDS = (*SCENERY, "red", "green", "yellow", "black")  # plain ones on which every mascot stands out
DRAWN_STREAM = 7  # apart from every stream of `toyworld`
SEED_STRIDE = 10_000  # pictures a seed may have; class pictures for training are below the first of them

Advance = Callable[[int], None]
Measured = dict[str, list[float]]


@dataclass(frozen=True)
class Arm:
    """A way to learn, and what keeps the class as it was: `pictures`, the base's `prediction` of them, or nothing."""

    name: str
    method: str
    prior: str | None


ARMS = (
    Arm("lora", "lora", None),
    Arm("dreambooth", "dreambooth", "pictures"),
    Arm("dreambooth by prediction", "dreambooth", "prediction"),
    Arm("ti", "ti", None),
    Arm("pti", "pti", "pictures"),
    Arm("joint", "joint", "pictures"),
)


@dataclass(frozen=True)
class Laboratory:
    """What all cells have in common. `pictures`: of a subject, and of its class, in a cell; `folder`: kept results."""

    components: Components
    scorer: Scorer
    base: Path
    judge: Path
    pictures: int
    folder: Path

    def key(self, section: object, inputs: Sequence[Path]) -> Path:
        """The folder for what depends on `section`, `inputs` and the base."""
        told = {"base": base_fingerprint(self.base), "section": section}
        return self.folder / content_key(told, [self.base / "vae", *inputs])[:32]


def section_of(section: ConceptParams, name: str) -> ConceptParams:
    """The model concept's section with its name replaced by `name`, everywhere."""
    return ConceptParams.model_validate_json(section.model_dump_json().replace(MODEL, name))


def total_steps(params: TrainParams) -> int:
    """Optimiser steps of every arm."""
    return params.inversion.steps + params.tuning.steps


def arm_params(params: TrainParams, arm: Arm) -> TrainParams:
    """The arm's training: all methods take the same number of steps; `pti` divides them as `params` does.

    The token of `joint` learns as in inversion where `params` has no rate for it in tuning.

    Raises:
        ParamsError: The arm wants class pictures, and `params` weighs them 0.
    """
    if arm.prior and not params.prior.weight:
        where = f"params.yaml: concepts.{MODEL}.train.prior.weight"
        raise ParamsError(where, "is 0, and the study compares with and without", "set it above 0")
    total = total_steps(params)
    inversion = {"pti": params.inversion.steps, "ti": total}.get(arm.method, 0)
    own = params.tuning.token_learning_rate
    rate = {"joint": own or params.inversion.learning_rate, "pti": own}.get(arm.method)
    prior = {"weight": params.prior.weight, "target": arm.prior} if arm.prior else {"weight": 0.0}
    return params.model_copy(
        update={
            "method": arm.method,
            "prior": params.prior.model_copy(update=prior),
            "inversion": params.inversion.model_copy(update={"steps": inversion}),
            "tuning": params.tuning.model_copy(update={"steps": total - inversion, "token_learning_rate": rate}),
        }
    )


def prompts_for(words: str, pictures: int) -> list[str]:
    """`pictures` prompts: `words` on the backgrounds in turn, rounded up to all of them."""
    rounds = -(-pictures // len(BACKGROUNDS))
    return [f"{words} {place_words(background)}" for background in BACKGROUNDS] * rounds


def paint(
    components: Components, prompts: Sequence[str], seeds: Sequence[int], settings: PriorsParams,
) -> np.ndarray:  # fmt: skip
    """Pictures uint8 (n, 64, 64, 3), with the settings that class pictures have."""
    return sample(
        components, prompts, seeds, steps=settings.steps, guidance_scale=settings.guidance_scale,
        negative_prompt="", weighting=None, batch=pictures_at_once(components),
    )  # fmt: skip


def picture_seeds(seed: int, count: int) -> range:
    """The seeds of a cell's pictures: others for every training seed, the same for every arm."""
    start = (1 + seed) * SEED_STRIDE
    return range(start, start + count)


def drawn(subject: str, seed: int, count: int) -> np.ndarray:
    """Fresh drawings of the subject, uint8 (count, 64, 64, 3), on the backgrounds in turn."""
    generators = [np.random.default_rng([seed, DRAWN_STREAM, index]) for index in range(count)]
    scenes = [mascot_scene(rng, subject, BACKGROUNDS[index % len(BACKGROUNDS)]) for index, rng in enumerate(generators)]
    return np.stack([np.asarray(draw(scene, rng)) for scene, rng in zip(scenes, generators, strict=True)])


def class_pictures(laboratory: Laboratory, section: ConceptParams, seed: int) -> np.ndarray:
    """The untouched base's pictures of the class prompts; kept."""
    prompts = prompts_for(f"a {section.class_noun}", laboratory.pictures)
    told = {"class": prompts, "seed": seed, "settings": section.priors.model_dump(mode="json")}
    path = laboratory.key(told, []) / "class.npy"
    if not path.is_file():
        with private(laboratory.components) as mine:
            pictures = paint(mine, prompts, picture_seeds(seed, len(prompts)), section.priors)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("partial.npy")
        np.save(partial, pictures, allow_pickle=False)
        partial.replace(path)
    return np.asarray(np.load(path, allow_pickle=False))


def priors_of(laboratory: Laboratory, section: ConceptParams) -> tuple[Example, ...]:
    """Class pictures to train with, painted once by the base; kept."""
    settings = section.priors
    folder = laboratory.key({"priors": settings.model_dump(mode="json")}, [])
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with private(laboratory.components) as mine:
            pictures = paint(mine, [settings.prompt] * settings.count, range(settings.count), settings)
        names = [f"{index:03}.png" for index in range(settings.count)]
        for name, picture in zip(names, pictures, strict=True):
            Image.fromarray(picture).save(folder / name)
        write_metadata(folder, dict.fromkeys(names, settings.prompt))
    return read_examples(folder)


def pictures_of(laboratory: Laboratory, section: ConceptParams, seed: int) -> tuple[Example, ...]:
    """The subject's own pictures, preprocessed."""
    told = section.model_dump(mode="json", include={"kind", "placeholder_token", "class_noun", "preprocess"})
    folder = laboratory.key({"seed": seed, **told}, [Path(section.images)])
    folder.mkdir(parents=True, exist_ok=True)
    preprocess(Path(section.images), folder, section, seed, lambda _: None)
    return read_examples(folder)


def reference_of(examples: Sequence[Example]) -> np.ndarray:
    """What likeness to a subject is held against: the pictures it is learnt from."""
    return np.stack([np.asarray(open_picture(example.image)) for example in examples])


def measured(
    laboratory: Laboratory, task: Task, section: ConceptParams, advance: Advance,
) -> Measured:  # fmt: skip
    """The cell of `task`: learnt, painted and scored, or read back where that was done before.

    Returns:
        `similarity`, `accuracy` and `leak` by picture; `drift` and `diversity` of the class pictures.
    """
    told = {
        "pictures": laboratory.pictures,
        "seed": task.seed,
        "concept": section.model_dump(mode="json", exclude={"train", "images", "extract"}),
        "train": task.params.model_dump(mode="json"),
    }
    folder = laboratory.key(told, [Path(section.images), laboratory.judge / "model.safetensors"])
    path = folder / "cell.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tuned = tune(laboratory.components, task, folder / "train", lambda step, _: advance(step))
        cell = scored(laboratory, task, section, tuned)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(cell) + "\n", encoding="utf-8")
        partial.replace(path)
        shutil.rmtree(folder / "train", ignore_errors=True)
    cells: Measured = json.loads(path.read_text(encoding="utf-8"))
    return cells


def task_of(laboratory: Laboratory, name: str, section: ConceptParams, seed: int, arm: Arm) -> Task:
    """What the cell of an arm learns."""
    examples = pictures_of(laboratory, section, seed)
    priors = priors_of(laboratory, section) if arm.prior else ()
    return Task(name, section.placeholder_token, examples, priors, arm_params(section.train, arm), seed)


def measure_cell(folders: tuple[Path, Path, int, Path], model: ConceptParams, name: str, seed: int, arm: Arm) -> None:
    """A cell in a process of its own; it is kept.

    Args:
        folders: Base, judge, pictures and folder of the laboratory.
        model: The concept all subjects are learnt by.
        name: The subject.
        seed: Of the training.
        arm: How.
    """
    base, judge, pictures, folder = folders
    laboratory = Laboratory(load_components(base), JudgeScorer(load_judge(judge)), base, judge, pictures, folder)
    section = section_of(model, name)
    measured(laboratory, task_of(laboratory, name, section, seed, arm), section, lambda _: None)


def scored(laboratory: Laboratory, task: Task, section: ConceptParams, tuned: Tuned) -> Measured:
    """What was learnt, painted and scored. The base comes back as it was."""
    scorer, count = laboratory.scorer, laboratory.pictures
    prompts = prompts_for(f"a {section.placeholder_token} {section.class_noun}", count)
    classes = prompts_for(f"a {section.class_noun}", count)
    seeds = picture_seeds(task.seed, len(prompts))
    with private(laboratory.components) as mine:
        add_adapter(mine, tuned.adapter({}), task.name)
        shown = paint(mine, prompts, seeds, section.priors)
        leaked = paint(mine, classes, seeds, section.priors)
    reference = scorer.identity(reference_of(task.examples))
    vectors = scorer.identity(leaked)
    untouched = scorer.identity(class_pictures(laboratory, section, task.seed))
    return {
        "similarity": likeness(scorer.identity(shown), reference).tolist(),
        "accuracy": scorer.prompt_accuracy(shown, prompts).tolist(),
        "leak": likeness(vectors, reference).tolist(),
        "drift": [drift(vectors, untouched)],
        "diversity": [diversity(vectors)],
    }


def anchors(
    laboratory: Laboratory, subject: str, section: ConceptParams, examples: Sequence[Example], seed: int,
) -> Mapping[str, Measured]:  # fmt: skip
    """The lower and the upper end: the untouched base asked for the class, and fresh drawings of the subject."""
    scorer = laboratory.scorer
    prompts = prompts_for(f"a {section.class_noun}", laboratory.pictures)
    reference = scorer.identity(reference_of(examples))
    base, real = class_pictures(laboratory, section, seed), drawn(subject, seed, len(prompts))
    untouched = scorer.identity(base)
    alike = likeness(untouched, reference).tolist()
    return {
        "base": {
            "similarity": alike,
            "accuracy": scorer.prompt_accuracy(base, prompts).tolist(),
            "leak": alike,
            "diversity": [diversity(untouched)],
        },
        "real": {
            "similarity": likeness(scorer.identity(real), reference).tolist(),
            "accuracy": scorer.prompt_accuracy(real, prompts).tolist(),
        },
    }
