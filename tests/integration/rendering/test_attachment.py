from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.errors import ParamsError
from lora_pipeline.pretrained.components import Components
from lora_pipeline.rendering.attachment import Attachment, acting, attach, check_placeholders
from lora_pipeline.rendering.sampling import sample
from lora_pipeline.rendering.schedule import schedule
from lora_pipeline.rendering.weighting import Weighting

SUM: dict[str, Any] = {"combine": "sum", "every": 1, "executor": "auto"}


def drawn(components: Components, prompt: str = "a dog", weighting: Weighting | None = None) -> np.ndarray:
    return sample(
        components, [prompt] * 2, [1, 2], steps=3, guidance_scale=2.0, negative_prompt="", weighting=weighting, batch=2
    )


def drawn_with(components: Components, attachments: list[Attachment], prompt: str = "a dog") -> np.ndarray:
    with acting(components, attachments, 3, **SUM) as weighting:
        return drawn(components, prompt, weighting)


def test_weight_0_is_the_base_bit_for_bit_and_weight_1_is_not(components: Components, adapter: Adapter) -> None:
    base = drawn(components)
    zorp = Attachment("zorp", adapter, schedule(0.0))
    attach(components, [zorp])
    np.testing.assert_array_equal(drawn_with(components, [zorp]), base)
    assert (drawn_with(components, [replace(zorp, schedule=schedule(1.0))]) != base).any()


def test_a_schedule_acts_between_its_ends(components: Components, adapter: Adapter) -> None:
    zorp = Attachment("zorp", adapter, schedule([(0.0, 0.0), (1.0, 1.0)]))
    attach(components, [zorp])
    ramp, again = (drawn_with(components, [zorp]) for _ in range(2))
    np.testing.assert_array_equal(ramp, again)
    ends = [drawn_with(components, [replace(zorp, schedule=schedule(end))]) for end in (0.0, 1.0)]
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
