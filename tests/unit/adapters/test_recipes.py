"""What each layer of each adapter is multiplied by."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.recipes import Recipe, path_shares
from lora_pipeline.errors import ParamsError

UNET, TEXT = "unet.conv_in", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
TEXT_2 = TEXT.replace("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    ("count", "at", "shares"),
    [
        (1, 0.0, [1.0]),
        (1, 0.7, [1.0]),
        (2, 0.0, [1.0, 0.0]),
        (2, 1.0, [0.0, 1.0]),
        (2, 0.25, [0.75, 0.25]),
        (3, 0.5, [0.0, 1.0, 0.0]),
        (3, 0.75, [0.0, 0.5, 0.5]),
        (5, 0.125, [0.5, 0.5, 0.0, 0.0, 0.0]),
    ],
)
def test_the_shares_on_a_path_are_linear_from_each_to_the_next(count: int, at: float, shares: list[float]) -> None:
    assert path_shares(count, at) == shares


@given(st.integers(1, 9), st.floats(0, 1))
def test_the_shares_on_a_path_make_up_one(count: int, at: float) -> None:
    assert sum(path_shares(count, at)) == pytest.approx(1.0)


def test_a_text_encoder_weight_stands_in_place_of_the_weight() -> None:
    recipe = Recipe(text_encoder_weights={"a": 0.0, "b": -2.0})
    a, b, c = (each.of([UNET, TEXT, TEXT_2]) for each in recipe.weights(["a", "b", "c"], [0.5, 1.0, 3.0]))
    assert a == {UNET: 0.5, TEXT: 0.0, TEXT_2: 0.0}
    assert b == {UNET: 1.0, TEXT: -2.0, TEXT_2: -2.0}
    assert c == {UNET: 3.0, TEXT: 3.0, TEXT_2: 3.0}


def test_blocks_and_places_multiply_all_weights() -> None:
    recipe = Recipe(
        "interpolate", at=0.25, text_encoder_weights={"a": 2.0}, block_weights={"a": {"BASE": 0.5, "IN00": -1.0}}
    )
    a, b = (each.of([UNET, TEXT]) for each in recipe.weights(["a", "b"], [4.0, 8.0]))
    assert a == {UNET: -3.0, TEXT: 0.75}
    assert b == {UNET: 2.0, TEXT: 2.0}


@pytest.mark.parametrize("key", ["text_encoder_weights", "block_weights"])
@pytest.mark.parametrize(("names", "said"), [(["b", "c"], "none"), (["a", "a"], "more than one")])
def test_weights_of_nobody_and_of_two_are_refused(key: str, names: list[str], said: str) -> None:
    given: dict[str, Any] = {key: {"a": 1.0 if key == "text_encoder_weights" else {"M00": 1.0}}}
    with pytest.raises(ParamsError, match=f"{key}: names 'a', which {said} of"):
        Recipe(**given).weights(names, [1.0, 1.0])


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"method": "average"}, "method"),
        ({"method": "interpolate"}, "at"),
        ({"method": "interpolate", "at": 1.5}, "at"),
        ({"method": "interpolate", "at": float("nan")}, "at"),
        ({"method": "sum", "at": 0.5}, "at"),
        ({"method": "ties"}, "density"),
        ({"method": "dare", "density": 0.0}, "density"),
        ({"method": "magnitude", "density": 1.1}, "density"),
        ({"method": "sum", "density": 0.5}, "density"),
        ({"method": "ties", "density": 0.5, "at": 0.5}, "at"),
    ],
)
def test_a_method_gets_the_numbers_it_needs_and_no_others(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ParamsError) as caught:
        Recipe(**given)
    assert caught.value.where == key


def test_provenance_tells_what_decides_the_result_and_nothing_else() -> None:
    assert Recipe(seed=3).document() == {"method": "sum"}
    assert Recipe("interpolate", at=0.0).document() == {"method": "interpolate", "at": 0.0}
    assert Recipe("ties", density=0.2, seed=3).document() == {"method": "ties", "density": 0.2}
    assert Recipe("dare", density=0.2, seed=3).document() == {"method": "dare", "density": 0.2, "seed": 3}
    assert Recipe(rank=RankRule("energy", 0.9)).document() == {"method": "sum", "rank": {"energy": 0.9}}
    bounded = Recipe(rank=RankRule("error", 0.1, at_most=8)).document()
    assert bounded == {"method": "sum", "rank": {"error": 0.1, "max_rank": 8}}
