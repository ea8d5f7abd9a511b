"""What training is shown: sizes, mirrors, captions, what is remembered, and what is set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageOps
from torch import Tensor
from train_values import train_params

from lora_pipeline.data.dataset import Example
from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.injection import inject
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.pretrained.latents import encode_images
from lora_pipeline.training.batches import Sampler
from lora_pipeline.training.cache import TensorCache
from lora_pipeline.training.conditioning import kept
from lora_pipeline.training.encodings import EncodedExample, Encoder
from lora_pipeline.training.objective import objective_of
from lora_pipeline.training.phases import TUNING, Phase
from lora_pipeline.training.tuning import Task, Tuned, tune

pytestmark = pytest.mark.filterwarnings("default::FutureWarning")
SIZES = ((8, 8), (16, 8), (8, 8), (8, 24))


def silent(step: int, values: dict[str, float]) -> None:
    del step, values


class Spy:
    """Counts the pictures an autoencoder is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures = 0

        def spied(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
            self.pictures += len(images)
            return encode_images(vae, images)

        monkeypatch.setattr("lora_pipeline.training.encodings.encode_images", spied)


def run(folder: Path, task: Task, parts: Components | None = None, cache: Path | None = None) -> Tuned:
    work = folder / f"work{len(list(folder.iterdir()))}"
    work.mkdir()
    said: list[str] = []
    return tune(parts or tiny.components(folder / "tokenizer"), task, work, silent, said.append, cache)


def sized(examples: Sequence[Example]) -> None:
    for example, size in zip(examples, SIZES, strict=False):
        Image.open(example.image).resize(size).save(example.image)


def same(left: Tuned, right: Tuned) -> bool:
    factors = all(
        torch.equal(left.factors[name].up, right.factors[name].up)
        and torch.equal(left.factors[name].down, right.factors[name].down)
        for name in left.factors
    )
    return factors and left.losses == right.losses and left.validation == right.validation


def test_pictures_of_several_sizes_are_encoded_each_as_it_is(tmp_path: Path) -> None:
    examples, parts = tiny.examples(tmp_path / "own", "a creature", 4), tiny.components(tmp_path / "tokenizer")
    sized(examples)
    encoded = Encoder(parts.vae, TensorCache(None), print).examples(examples)
    assert [tuple(each.mean.shape) for each in encoded] == [(4, height // 2, width // 2) for width, height in SIZES]
    for example, each in zip(examples, encoded, strict=True):
        with Image.open(example.image) as picture:
            width, height = picture.size
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
        mean, _ = encode_images(parts.vae, pixels.reshape(1, height, width, 3).permute(0, 3, 1, 2) / 127.5 - 1)
        torch.testing.assert_close(each.mean, mean[0])


def test_the_mirrored_picture_is_encoded_and_not_its_latents_mirrored(tmp_path: Path) -> None:
    examples, parts = tiny.examples(tmp_path / "own", "a creature", 2), tiny.components(tmp_path / "tokenizer")
    others = tiny.examples(tmp_path / "mirrored", "a creature", 2)
    for example, other in zip(examples, others, strict=True):
        ImageOps.mirror(Image.open(example.image)).save(other.image)
    encoder = Encoder(parts.vae, TensorCache(None), print)
    for each, other_way in zip(encoder.examples(examples, flip=True), encoder.examples(others), strict=True):
        assert each.mirrored is not None
        assert torch.equal(each.mirrored.mean, other_way.mean)
        assert torch.equal(each.mirrored.deviation, other_way.deviation)
        assert not torch.allclose(each.mirrored.mean, each.mean.flip(-1), atol=1e-4)


def test_sides_that_latents_cannot_stand_for_are_refused(tmp_path: Path) -> None:
    task = tiny.task(tmp_path)
    Image.new("RGB", (12, 8)).save(task.examples[1].image)
    with pytest.raises(CorruptError, match=r"001\.png: is 12 x 8"):
        run(tmp_path, task)


def pool(count: int, shape: tuple[int, ...] = (1, 2, 2), caption: str = "a, b, c") -> list[EncodedExample]:
    def example(value: float) -> EncodedExample:
        return EncodedExample(caption, torch.full(shape, value), torch.zeros(shape))

    return [replace(example(index), mirrored=example(-1.0 - index)) for index in range(count)]


WHOLE = (0.0, 1.0)


def sampler_of(
    phase: Phase, pools: tuple[Sequence[EncodedExample], Sequence[EncodedExample]], batch_size: int
) -> Sampler:
    return Sampler(phase, pools, batch_size, objective_of(train_params({}), phase, DDIMScheduler()), 0)


def test_half_of_the_visits_are_mirrored_and_every_step_draws_its_own() -> None:
    sampler = sampler_of(Phase(TUNING, 200, 0.1, False, 0.0, 0.0, WHOLE), (pool(5), []), 4)
    seen = torch.stack([batch.latents[:, 0, 0, 0] for step in range(200) for batch in sampler.batches(step)])
    assert 0.45 < float((seen < 0).float().mean()) < 0.55
    assert torch.equal(sampler.batches(77)[0].latents[:, 0, 0, 0], seen[77])


def test_class_pictures_of_another_shape_make_a_batch_of_their_own() -> None:
    phase = Phase(TUNING, 9, 0.1, False, 0.5, 0.0, WHOLE)
    together = sampler_of(phase, (pool(2), pool(2)), 3).batches(0)
    apart = sampler_of(phase, (pool(2), pool(2, (1, 4, 2))), 3).batches(0)
    assert [len(batch.captions) for batch in together] == [6]
    assert [tuple(batch.latents.shape) for batch in apart] == [(3, 1, 2, 2), (3, 1, 4, 2)]
    for name in ("timesteps", "weights"):
        joined = torch.cat([getattr(batch, name) for batch in apart])
        assert torch.equal(joined, getattr(together[0], name))


def test_captions_of_both_pools_are_shuffled_by_the_step() -> None:
    phase = Phase(TUNING, 9, 0.1, False, 1.0, 0.0, WHOLE, kept_tags=1)
    sampler = sampler_of(phase, (pool(2), pool(2, caption="d, e, f")), 3)
    captions = [sampler.batches(step)[0].captions for step in range(20)]
    assert {caption for some in captions for caption in some[:3]} == {"a, b, c", "a, c, b"}
    assert {caption for some in captions for caption in some[3:]} == {"d, e, f", "d, f, e"}
    assert sampler.batches(7)[0].captions == captions[7]


def test_outputs_of_shuffled_captions_are_right_though_few_are_kept(tmp_path: Path) -> None:
    parts = tiny.components(tmp_path / "tokenizer")
    condition, asked = kept(parts, 1), ["a dog", "a creature", "a dog", ""]
    for some in (asked, asked[::-1], ["a creature"]):
        torch.testing.assert_close(condition(some).states, encode_prompts(parts, some).states)


@pytest.mark.parametrize("method", ["lora", "pti"])
def test_what_is_known_is_not_encoded_again_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    spy, cache = Spy(monkeypatch), tmp_path / "cache"
    task = tiny.task(tmp_path, {"method": method, "pictures.flip": True})
    truth = run(tmp_path, task)
    assert spy.pictures == 3 + 3 + 2
    assert same(run(tmp_path, task, cache=cache), truth)
    assert spy.pictures == 16
    assert same(run(tmp_path, task, cache=cache), truth)
    task.params.tuning.learning_rate = 0.02
    assert not same(run(tmp_path, task, cache=cache), truth)
    assert spy.pictures == 16
    Image.new("RGB", (8, 8), "red").save(task.priors[0].image)
    run(tmp_path, task, cache=cache)
    assert spy.pictures == 16 + 2


def test_another_autoencoder_is_not_taken_for_this_one(tmp_path: Path) -> None:
    task, cache = tiny.task(tmp_path, {"method": "lora"}), tmp_path / "cache"
    run(tmp_path, task, cache=cache)
    parts = tiny.components(tmp_path / "tokenizer")
    parts.vae.quant_conv.bias.data += 0.1
    assert same(run(tmp_path, task, parts, cache), run(tmp_path, task, parts))


def test_shuffled_captions_are_said_to_be_asked_for_as_they_come(tmp_path: Path) -> None:
    said: list[str] = []
    task = tiny.task(tmp_path, {"method": "lora", "captions.shuffle": True})
    tagged = replace(task, examples=[replace(each, caption="a <zorp>, dog, creature") for each in task.examples])
    for each in (task, tagged):  # the first has nothing to shuffle
        assert not said
        work = tmp_path / f"work {each is task}"
        work.mkdir()
        tune(tiny.components(tmp_path / "tokenizer"), each, work, silent, said.append)
    assert len(said) == 1
    assert "captions are shuffled" in said[0]


def test_the_validation_loss_is_that_of_the_same_noise_in_every_run(tmp_path: Path) -> None:
    changes = {"method": "lora", "validation.every": 2, "validation.pictures": 1, "tuning.steps": 5}
    told: dict[int, float] = {}
    task = tiny.task(tmp_path, changes)
    (tmp_path / "work").mkdir()
    parts = tiny.components(tmp_path / "tokenizer")
    tuned = tune(
        parts, task, tmp_path / "work", lambda step, values: told.update({step: values.get("validation_loss", -1)})
    )
    assert {step: loss for step, loss in told.items() if loss >= 0} == {
        each.step: each.loss for each in tuned.validation
    }
    assert [each.step for each in tuned.validation] == [2, 4, 5]
    task.params.tuning.learning_rate = 1e-12  # the factors' up side stays 0, so that the base itself is looked at
    first = run(tmp_path, task).validation
    assert len({round(each.loss, 6) for each in first}) == 1
    task.params.batch_size = 1
    assert run(tmp_path, task).validation[0].loss == pytest.approx(first[0].loss)


def test_pictures_that_are_set_aside_are_never_learnt_from(tmp_path: Path) -> None:
    changes = {"method": "lora", "validation.every": 9, "validation.pictures": 2, "tuning.steps": 8}
    task = tiny.task(tmp_path, changes)
    learnt = [run(tmp_path, task).factors]
    for example in task.examples:  # whichever is learnt from, the other two may change
        before = example.image.read_bytes()
        Image.new("RGB", (8, 8), "red").save(example.image)
        learnt.append(run(tmp_path, task).factors)
        example.image.write_bytes(before)
    name = next(iter(learnt[0]))
    assert sum(torch.equal(each[name].up, learnt[0][name].up) for each in learnt[1:]) == 2


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        ({"validation.every": 1, "validation.pictures": 3}, "validation.pictures", "3 of 3"),
        ({"pictures.repeats": {"close*": 2}}, "pictures.repeats", "matches no picture"),
    ],
)
def test_what_these_pictures_cannot_give_is_refused(
    tmp_path: Path, changes: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(ParamsError, match=problem) as caught:
        run(tmp_path, tiny.task(tmp_path, changes))
    assert caught.value.where == f"concepts.zorp.train.{key}"


def test_nothing_is_left_in_the_base_with_all_of_it(tmp_path: Path) -> None:
    task = tiny.task(tmp_path, {"pictures.flip": True, "captions.shuffle": True, "pictures.repeats": {"00?.png": 3}})
    sized(task.examples)
    parts = tiny.components(tmp_path / "tokenizer")
    assert run(tmp_path, task, parts).factors
    assert not inject.trainable(parts.unet)
