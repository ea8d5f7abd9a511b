"""What is refused before the first step, so that no minute is spent on a run that cannot be right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lora_pipeline.data.captions import check_caption
from lora_pipeline.data.dataset import Example
from lora_pipeline.errors import ParamsError
from lora_pipeline.injection.tokens import WORDLESS
from lora_pipeline.training.phases import FACTORS, TOKEN, TUNING, Phase

if TYPE_CHECKING:
    from lora_pipeline.params import TrainParams
    from lora_pipeline.params.training import AdapterParams
    from lora_pipeline.training.tuning import Task

_OF_THE_CONCEPT = ("placeholder_token", "priors", "images")


@contextmanager
def located(concept: str) -> Iterator[None]:
    """Gives errors about a value of a concept the value's full path in params.yaml."""
    try:
        yield
    except ParamsError as error:
        if " " in error.where:  # a prompt, not a key
            raise
        section = "" if error.where in _OF_THE_CONCEPT else "train."
        raise ParamsError(f"concepts.{concept}.{section}{error.where}", error.problem, error.fix) from None


def check_task(task: Task, phases: tuple[Phase, ...], tokenizer: Any) -> None:
    """Refuses what pictures, captions and params cannot be together.

    Raises:
        ParamsError: Names the value.
        CorruptError: Names the picture whose caption lacks the placeholder.
    """
    params, learning = task.params, {phase.name for phase in phases}
    if not task.examples:
        raise ParamsError("images", "there is no picture to learn from", "run lora-pipe preprocess for this concept")
    if TUNING in learning and params.prior.weight > 0 and not task.priors:
        check_anchors(task)
    if params.objective.mask_background is not None and not any(example.mask for example in task.examples):
        fix = "put NAME.mask.png beside NAME.png and run lora-pipe preprocess, or set it to null"
        raise ParamsError("objective.mask_background", "is set, and no picture has a mask", fix)
    check_learners(task, frozenset[str]().union(*(phase.learns for phase in phases)), tokenizer)
    if params.captions.shuffle and task.token is not None and "," in task.token:
        problem = f"shuffles the parts between commas, and the placeholder {task.token!r} holds one"
        raise ParamsError("captions.shuffle", problem, "use a placeholder without a comma, or set it to false")
    repeats_of(task.examples, params.pictures.repeats)
    for example in task.examples:
        check_caption(str(example.image), example.caption, task.token, None)


def check_learners(task: Task, learns: frozenset[str], tokenizer: Any) -> None:
    """Refuses factors without layers, and a token without a name or without words to start from.

    Raises:
        ParamsError: It is so.
    """
    params = task.params
    check_dropout(params.adapter)
    if FACTORS in learns and not [*params.adapter.unet_targets, *params.adapter.text_encoder_targets]:
        raise ParamsError("adapter.unet_targets", "names no layer", 'name some, such as "*attn*.to_q"')
    if TOKEN in learns:
        if task.token is None:
            fix = "give the concept a placeholder_token such as <zorp>, or use method lora"
            raise ParamsError("placeholder_token", f"is null, and method {params.method} learns it", fix)
        check_initializer(tokenizer, params.token.initializer)


def check_dropout(params: AdapterParams) -> None:
    """Refuses to leave out, or to shorten, factors that stand for parts of the base itself.

    Raises:
        ParamsError: It is so.
    """
    given = [key for key in ("dropout", "rank_dropout", "module_dropout", "max_norm") if getattr(params, key)]
    if given and params.init == "pissa":
        problem = f"is pissa, whose factors hold parts of the base, and {given[0]} is set"
        raise ParamsError("adapter.init", problem, f"write kaiming, or take {given[0]} away")


def check_encoders(params: TrainParams, encoders: int) -> None:
    """Refuses learning rates of more text encoders than there are.

    Raises:
        ParamsError: It is so.
    """
    given = params.tuning.text_encoder_learning_rate
    if isinstance(given, Sequence) and len(given) != encoders:
        problem = f"has {len(given)} rates, and this base has {encoders} text encoder"
        raise ParamsError("tuning.text_encoder_learning_rate", problem, "write one number, or null")


def check_anchors(task: Task) -> None:
    """Refuses priors without class pictures, unless the base's predictions on one's own pictures can stand for them.

    Raises:
        ParamsError: They cannot.
    """
    weight = task.params.prior.weight
    if task.params.prior.target == "pictures":
        fix = "set priors.count above 0, prior.weight to 0, or prior.target to prediction"
        raise ParamsError("prior.weight", f"is {weight}, and there are no class pictures", fix)
    if task.token is None:
        problem = "is prediction without class pictures, and without a token no caption leaves the concept out"
        raise ParamsError("prior.target", problem, "set priors.count above 0, or prior.weight to 0")


def repeats_of(examples: Sequence[Example], repeats: Mapping[str, int]) -> list[int]:
    """How often each picture comes where one that no glob matches comes once.

    Args:
        examples: Pictures.
        repeats: By glob over the names their files had in the concept's folder; the last that matches counts.

    Raises:
        ParamsError: A glob matches no picture.
    """
    for glob in repeats:
        if not any(fnmatchcase(example.name, glob) for example in examples):
            names = ", ".join(example.name for example in examples[:3])
            problem = f"{glob!r} matches no picture; they are {names}{' ...' if len(examples) > 3 else ''}"
            raise ParamsError("pictures.repeats", problem, "correct it, or take it out")
    return [([1] + [times for glob, times in repeats.items() if fnmatchcase(each.name, glob)])[-1] for each in examples]


def check_initializer(tokenizer: Any, initializer: str) -> None:
    """Refuses words the base does not know: rows started from pieces of words start from noise.

    Raises:
        ParamsError: No word, or one that is not a single token.
    """
    if initializer in WORDLESS:
        return
    words = re.findall(r"\S+", initializer)
    if not words:
        raise ParamsError("token.initializer", "holds no word", "use a word the base knows, such as the class noun")
    for word in words:
        ids = tokenizer(word, add_special_tokens=False, padding=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            problem = f"{word!r} is not one token of this base"
            raise ParamsError("token.initializer", problem, "use a word the base knows, such as the class noun")
