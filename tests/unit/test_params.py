from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_pipeline.adapters.ranks import rank_rule
from lora_pipeline.errors import MissingError, ParamsError
from lora_pipeline.params import Params, WeightParams, load_params
from lora_pipeline.params.defaults import with_defaults
from lora_pipeline.yaml_file import LARGEST_BYTES, read_yaml

SHIPPED = (Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8")
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> Path:
        path = tmp_path / "params.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def edited(old: str, new: str) -> str:
    assert old in SHIPPED
    return SHIPPED.replace(old, new, 1)


def with_blend(edits: dict[str, str]) -> str:
    """The shipped file with other values in its blend."""
    start = SHIPPED.index("blends:")
    before, blend = SHIPPED[:start], SHIPPED[start:]
    for key, value in edits.items():
        blend, count = re.subn(rf"^    {key}: (\{{\}}|\S+)", f"    {key}: {value}", blend, count=1, flags=re.MULTILINE)
        assert count == 1
    return before + blend


def refusal(path: Path) -> ParamsError:
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    assert caught.value.exit_code == 3
    return caught.value


def test_the_shipped_file_is_sound(write: Write) -> None:
    params = load_params(write(SHIPPED))
    assert set(params.concepts) == {"zorp", "sticker"}
    sticker = params.renders["schedule"].weights["sticker"]
    assert isinstance(sticker, WeightParams)
    assert sticker.knots == [(0.0, 0.0), (0.2, 0.0), (0.5, 1.1), (1.0, 1.1)]
    assert (sticker.between, sticker.window) == ("linear", (0.0, 1.0))


def test_params_cannot_be_changed(write: Write) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_params(write(SHIPPED)).seed = 8


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        ("rank: 8\n", "rank: 0\n", "defaults.train.adapter.rank", "1, found 0"),
        ("rank: 8\n", "rank: 8.5\n", "defaults.train.adapter.rank", "integer, found 8.5"),
        ("batch_size: 4", "batch_size: true", "defaults.train.batch_size", "found True"),
        ("method: lora\n", "method: lycoris\n", "concepts.sticker.train.method", "found 'lycoris'"),
        ("crop: center", "crop: no", "defaults.preprocess.crop", "found 'no'"),
        ("alpha: 8.0", "alpha: .nan", "defaults.train.adapter.alpha", "finite"),
        ("alpha: 8.0", "alpha: 1e999", "defaults.train.adapter.alpha", "finite"),
        (
            "dropout: 0.0          # share of captions",
            "dropout: 1.0  # share of captions",
            "defaults.train.captions.dropout",
            "less than 1",
        ),
        ("[0.2, 0.0], [0.5, 1.1]", "[0.5, 0.0], [0.2, 1.1]", "renders.schedule.weights.sticker", "rising"),
        ("between: linear", "between: bezier", "renders.schedule.weights.sticker", "found 'bezier'"),
        ("window: [0.0, 1.0]", "window: [0.9, 0.1]", "renders.schedule.weights.sticker", "start, end"),
        ("combine: sum            #", "combine: mean  #", "renders.zorp.combine", "found 'mean'"),
        ("executor: auto          #", "executor: fast  #", "renders.zorp.executor", "found 'fast'"),
        ("rank: null  ", "rank: 0  ", "defaults.extract.rank", "1, found 0"),
        ("rank: null  ", "rank: {energy: 1.5}  ", "defaults.extract.rank", "above 0 and below 1"),
        ("rank: null  ", "rank: {energy: 0.0}  ", "defaults.extract.rank", "above 0 and below 1"),
        ("rank: null  ", "rank: {energy: 0.9, error: 0.1}  ", "defaults.extract.rank", "one of energy, error"),
        ("rank: null  ", "rank: {max_rank: 4}  ", "defaults.extract.rank", "one of energy, error"),
        ("rank: null  ", "rank: {error: 0.1, max_rank: 4.5}  ", "defaults.extract.rank", "a whole number"),
        ("rank: null  ", "rank: {error: 0.1, max_rank: 0}  ", "defaults.extract.rank", "a whole number"),
        ("rank: null  ", "rank: {threshold: 0}  ", "defaults.extract.rank", "threshold is above 0"),
        ("rank: null  ", "rank: four  ", "defaults.extract.rank", "found 'four'"),
        ("rank: null  ", "rank: {enrgy: 0.9}  ", "defaults.extract.rank", "one of energy, error"),
        ("base: models/base", "base: ../base", "base", "inside the project"),
        ("zorp-sticker:\n    weights", "v1.5:\n    weights", "blends.v1.5", "a name is letters"),
        ("method: sum ", "method: mean ", "blends.zorp-sticker.method", "found 'mean'"),
        ("density: null", "density: 1.5", "blends.zorp-sticker.density", "1, found 1.5"),
        ("rank: null              # as", "rank: 0  # as", "blends.zorp-sticker.rank", "1, found 0"),
        ("rank: null              # as", "rank: {error: 2}  # as", "blends.zorp-sticker.rank", "below 1"),
        ("block_weights: {} ", "block_weights: {zorp: {IN04: no}} ", "block_weights.zorp.IN04", "found 'no'"),
    ],
)
def test_a_value_that_cannot_be_is_told_by_its_key(write: Write, old: str, new: str, key: str, said: str) -> None:
    error = refusal(write(edited(old, new)))
    assert key in error.where
    assert said in error.problem


@pytest.mark.parametrize(
    ("old", "new", "meant"),
    [
        ("rank: 8\n", "rnak: 8\n", "'rank'"),
        ("blends:", "blend:", "'blends'"),
        ("captions: files", "caption: files", "'captions'"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(write: Write, old: str, new: str, meant: str) -> None:
    assert meant in refusal(write(edited(old, new))).fix


def test_an_unknown_concept_names_the_nearest_known_one(write: Write) -> None:
    error = refusal(write(edited("{zorp: 0.9, sticker: 1.1}", "{zrop: 1.0}")))
    assert "blends.zorp-sticker.weights" in error.where
    assert "'zorp'" in error.fix


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('placeholder_token: "<zorp>"', "placeholder_token: null", "concepts.zorp.placeholder_token"),
        ("steps: 100", "steps: 0", "concepts.zorp.train.inversion.steps"),
        ("steps: 250", "steps: 0", "concepts.zorp.train.tuning.steps"),
        ("count: 48     ", "count: 0     ", "concepts.zorp.train.prior.weight"),
    ],
)
def test_a_method_needs_what_it_learns(write: Write, old: str, new: str, key: str) -> None:
    error = refusal(write(edited(old, new)))
    assert error.where == f"params.yaml: {key}"


def fitted(change: str = "draws: 2") -> str:
    """A blend's `fit` with one of its keys changed."""
    values = {
        "granularity": "block", "prompts": "{zorp: [a <zorp>], sticker: [a sticker]}", "draws": "6", "steps": "100",
        "learning_rate": "0.02", "regularisation": "0.01",
    }  # fmt: skip
    key, _, value = change.partition(": ")
    return "{" + ", ".join(f"{each}: {told}" for each, told in (values | {key: value}).items()) + "}"


@pytest.mark.parametrize(
    ("edits", "key"),
    [
        ({"method": "interpolate", "at": "0.5"}, "path"),
        ({"method": "interpolate", "path": "[sticker, zorp]"}, "at"),
        ({"method": "interpolate", "path": "[zorp]", "at": "0.5"}, "path"),
        ({"method": "interpolate", "path": "[zorp, zorp]", "at": "0.5"}, "path"),
        ({"method": "interpolate", "path": "[zorp, sticker]", "at": "0.5", "density": "0.5"}, "density"),
        ({"method": "ties"}, "density"),
        ({"method": "dare", "density": "0.5", "path": "[zorp, sticker]"}, "path"),
        ({"at": "0.5"}, "at"),
        ({"text_encoder_weights": "{mimo: 1}"}, "text_encoder_weights"),
        ({"block_weights": "{mimo: {M00: 1}}"}, "block_weights"),
        ({"method": "distill"}, "fit"),
        ({"fit": fitted()}, "fit"),
        ({"method": "distill", "fit": fitted(), "density": "0.5"}, "density"),
        ({"method": "distill", "fit": fitted(), "block_weights": "{zorp: {M00: 1}}"}, "block_weights"),
        ({"method": "distill", "fit": fitted("prompts: {zorp: [a]}")}, "fit.prompts"),
        ({"method": "distill", "fit": fitted("prompts: {zorp: [a], sticker: [a], mimo: [a]}")}, "fit.prompts"),
        ({"method": "distill", "fit": fitted("prompts: {zorp: [a], sticker: []}")}, "fit.prompts.sticker"),
        ({"method": "distill", "fit": fitted("steps: 0")}, "fit.steps"),
        ({"method": "distill", "fit": fitted("learning_rate: 0")}, "fit.learning_rate"),
        ({"method": "least_squares", "fit": fitted("granularity: column")}, "fit.granularity"),
        ({"method": "least_squares", "fit": fitted("granularity: layer")}, "fit.granularity"),
    ],
)
def test_a_blend_has_what_its_method_needs_and_nothing_else(write: Write, edits: dict[str, str], key: str) -> None:
    assert refusal(write(with_blend(edits))).where == f"params.yaml: blends.zorp-sticker.{key}"


@pytest.mark.parametrize(
    "edits",
    [
        {"method": "interpolate", "path": "[sticker, zorp]", "at": "0"},
        {"method": "ties", "density": "0.2", "rank": "8"},
        {"method": "distill", "fit": fitted("granularity: column"), "rank": "8"},
        {"method": "least_squares", "fit": fitted("steps: 0")},
        {"method": "dare", "density": "1", "rank": "{energy: 0.9, max_rank: 8}"},
        {"text_encoder_weights": "{zorp: -1}", "block_weights": "{zorp: [1, 0.5], sticker: {M00: 0, '*attn2*': -1}}"},
    ],
)
def test_a_blend_may_be_of_any_method(write: Write, edits: dict[str, str]) -> None:
    blend = load_params(write(with_blend(edits))).blends["zorp-sticker"]
    assert blend.method == edits.get("method", "sum")


def test_a_wrong_choice_names_the_nearest(write: Write) -> None:
    assert "'pti'" in refusal(write(edited("method: pti", "method: ptti"))).fix


def keys_of(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The fixed keys of the file: not the names users give to concepts, blends, merges and render sets."""
    if not isinstance(value, dict):
        return []
    below = [inner for key, item in value.items() for inner in keys_of(item, (*path, key))]
    named = (len(path) == 1 and path[0] != "defaults") or path[-1:] in (("weights",), ("options",))
    return below + ([] if named else [(*path, key) for key in value])


def test_no_key_has_a_default_outside_the_file(write: Write) -> None:
    """A value that DVC cannot see is a value it cannot rerun for."""
    whole = with_defaults(read_yaml(write(SHIPPED)))
    keys = keys_of(whole)
    assert len(keys) > 200
    for path in keys:
        content: Any = copy.deepcopy(whole)
        section = content
        for key in path[:-1]:
            section = section[key]
        del section[path[-1]]
        with pytest.raises(ValidationError, match="Field required"):
            Params.model_validate(content)


def test_a_concept_goes_before_the_defaults(write: Write) -> None:
    own = 'train:\n      adapter: {rank: 3, ranks: {a: 5}}\n      samples: {prompt: "a <zorp>'
    text = edited('train:\n      samples: {prompt: "a <zorp>', own).replace("ranks: {}  ", "ranks: {a: 4, b: 6}  ", 1)
    concepts = load_params(write(text)).concepts
    assert concepts["zorp"].train.adapter.rank == 3
    assert concepts["zorp"].train.adapter.ranks == {"a": 5, "b": 6}
    assert concepts["zorp"].train.adapter.alpha == 8.0
    assert concepts["sticker"].train.adapter.rank == 8
    assert concepts["sticker"].train.adapter.ranks == {"a": 4, "b": 6}


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("train:\n      method: lora", "train:\n      adapter: {rank: 0}", "concepts.sticker.train.adapter.rank"),
        ("train:\n      method: lora", "train:\n      adapter: 8", "concepts.sticker.train.adapter"),
        ("train:\n      method: lora", "train:\n      adapter: {rnak: 8}", "concepts.sticker.train.adapter.rnak"),
        ("defaults:  ", "defaults: 8 #", "defaults"),
        ("  extract:\n    rank: null", "  extrct:\n    rank: null", "defaults"),
        ("    extract: {}", "", "concepts.zorp.extract"),
    ],
)
def test_a_fault_is_told_where_it_stands(write: Write, old: str, new: str, where: str) -> None:
    text = edited(old, new)
    if new.endswith("#"):
        text = re.sub(r"(?m)^defaults: 8 #.*\n(  .*\n)+", "defaults: 8\n", text)
    assert refusal(write(text)).where.startswith(f"params.yaml: {where}")


@pytest.mark.parametrize("choice", ["null", "4", "{energy: 0.95}", "{error: 0.1, max_rank: 16}", "{threshold: 2}"])
def test_an_adapters_rank_is_a_number_or_a_rule(write: Write, choice: str) -> None:
    rank = load_params(write(edited("rank: null  ", f"rank: {choice}  "))).concepts["zorp"].extract.rank
    assert rank == read_yaml(write(f"rank: {choice}"))["rank"]
    rank_rule(rank)  # has a meaning


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "1.0E-4", "0.0001", "1e-04", "+.0001"])
def test_a_learning_rate_is_a_number_however_it_is_written(write: Write, written: str) -> None:
    params = load_params(write(edited("learning_rate: 4.0e-3", f"learning_rate: {written}")))
    assert params.concepts["zorp"].train.tuning.learning_rate == 0.0001


@pytest.mark.parametrize("word", ["no", "on", "off", "yes", "y", "1:30", "1_000", "2020-01-01", "="])
def test_what_yaml_1_1_would_twist_stays_text(write: Write, word: str) -> None:
    assert read_yaml(write(f"key: {word}")) == {"key": word}


@given(value=st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none())
def test_values_are_what_dvc_reads(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    """DVC reads with ruamel.yaml; what it tracks must be what we use."""
    from ruamel.yaml import YAML

    spelt = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    path = tmp_path_factory.mktemp("yaml") / "params.yaml"
    path.write_text(f"key: {spelt}\n", encoding="utf-8")
    ours, theirs = read_yaml(path)["key"], YAML(typ="safe").load(path)["key"]
    assert (ours, type(ours)) == (theirs, type(theirs)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 7\nseed: 8", "twice"),
        ("a: {b: 1, b: 2}", "twice"),
        ("key: !!python/object/apply:os.system ['true']", "tag"),
        ("- a list", "expected `key: value`"),
        ("\tseed: 7", "cannot start any token"),
        ("a: 1\n---\nb: 2", "another document"),
        ("? [a, b]\n: 1", "a key must be"),
        ("a: " + "[\n" * 1500 + "]" * 1500, "nested"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(write: Write, text: str, said: str) -> None:
    assert said in refusal(write(text)).problem


def test_a_file_of_another_size_or_encoding_is_refused(write: Write) -> None:
    assert "larger" in refusal(write("#" * (LARGEST_BYTES + 1))).problem
    path = write("")
    path.write_bytes(b"a: \xff")
    assert "UTF-8" in refusal(path).problem


def test_no_file_is_told_as_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        load_params(tmp_path / "params.yaml")
