from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.errors import ParamsError
from lora_pipeline.pretrained.components import Components
from lora_pipeline.rendering.attachment import Attachment, attach, check_placeholders
from lora_pipeline.rendering.sampling import WeightsAt, sample
from lora_pipeline.rendering.schedule import schedule


def drawn(components: Components, weights_at: WeightsAt | None, prompt: str = "a dog") -> np.ndarray:
    return sample(
        components, [prompt] * 2, [1, 2], steps=3, guidance_scale=2.0, negative_prompt="", weights_at=weights_at,
        batch=2,
    )  # fmt: skip


def test_weight_0_is_the_base_bit_for_bit_and_weight_1_is_not(components: Components, adapter: Adapter) -> None:
    base = drawn(components, None)
    attach(components, [Attachment("zorp", adapter, schedule(0.0))])(0.0)
    np.testing.assert_array_equal(drawn(components, None), base)
    attach(components, [Attachment("again", replace(adapter, embeddings={}), schedule(1.0))])(0.0)
    assert (drawn(components, None) != base).any()


def test_a_schedule_acts_between_its_ends(components: Components, adapter: Adapter) -> None:
    weights_at = attach(components, [Attachment("zorp", adapter, schedule([(0.0, 0.0), (1.0, 1.0)]))])
    ramp, late = drawn(components, weights_at), drawn(components, weights_at)
    np.testing.assert_array_equal(ramp, late)  # every batch starts at progress 0 again
    ends = [drawn(components, lambda _, at=end: weights_at(at)) for end in (0.0, 1.0)]  # type: ignore[misc]  # mypy cannot type a lambda's default
    assert all((ramp != end).any() for end in ends)


def test_two_adapters_of_one_name_are_refused(components: Components, adapter: Adapter) -> None:
    with pytest.raises(ParamsError, match="two adapters"):
        attach(components, [Attachment("zorp", adapter, schedule(1.0))] * 2)


def test_an_unknown_placeholder_is_refused_and_the_known_ones_are_told(
    components: Components, adapter: Adapter
) -> None:
    attach(components, [Attachment("zorp", adapter, schedule(1.0))])
    check_placeholders(components.tokenizer, [adapter], ["a <ZORP> dog", "a dog < a creature"])
    with pytest.raises(ParamsError, match="<zrop> is no token; known: <zorp>") as refusal:
        check_placeholders(components.tokenizer, [adapter], ["a <zrop> dog"])
    assert refusal.value.fix == "write '<zorp>'"


def test_a_placeholder_that_training_spelt_in_letters_is_known(components: Components) -> None:
    lora = Adapter({}, {}, {"params": {"placeholder_token": "<bork>"}})
    check_placeholders(components.tokenizer, [lora], ["a <bork> dog"])
    with pytest.raises(ParamsError, match="<bork>"):
        check_placeholders(components.tokenizer, [lora], ["a <zorp> dog"])


def test_beside_an_adapter_of_unknown_training_nothing_is_refused(components: Components) -> None:
    check_placeholders(components.tokenizer, [Adapter({})], ["a <bork> dog"])
    with pytest.raises(ParamsError, match="known: none"):
        check_placeholders(components.tokenizer, [], ["a <bork> dog"])
