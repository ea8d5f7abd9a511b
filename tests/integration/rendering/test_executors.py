"""Three ways to the same pictures, and a base that is left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.injection import inject
from lora_pipeline.pretrained.adapted import set_weights
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.denoising import Denoiser
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.rendering.attachment import Attachment, acting, attach
from lora_pipeline.rendering.sampling import sample
from lora_pipeline.rendering.schedule import schedule
from lora_pipeline.rendering.weighting import Weighting, weighted

EXECUTORS = ("fuse", "cache", "gate")
STEPS = 5


def adapter_of(components: Components, seed: int, dora: bool = False) -> Adapter:
    source = torch.Generator().manual_seed(seed)
    factors: dict[str, Any] = {}
    for prefix, model in components.models.items():
        globs = ["*attn*.to_?", "*.conv1"] if prefix == "unet" else ["*_proj"]
        targets = inject.select_targets(model, prefix, globs)
        inject.inject_new(model, prefix, targets, "new", rank=1 + seed, alpha=2.0, generator=source)
        for parameter in inject.trainable(model).values():
            parameter.data = torch.randn(parameter.shape, generator=source) / 2
        factors |= inject.collect(model, prefix, "new")
        inject.remove(model)
    unet = [target for target in factors if target.startswith("unet.")]
    norms = {
        target: 0.5 + torch.rand(len(factors[target].up), *[1] * (factors[target].up.ndim - 1), generator=source)
        for target in unet[:3]
    }
    return Adapter(factors, magnitudes=norms if dora else {})


def attached(folder: Path, kind: str = "sd1", dora: bool = False) -> tuple[Components, list[Attachment]]:
    components = tiny.components(folder / "tokenizer", kind=kind)
    attachments = [
        Attachment("zorp", adapter_of(components, 1, dora), schedule([(0.0, 0.2), (1.0, 1.0)], blocks={"M00": 0.5})),
        Attachment("ink", adapter_of(components, 2), schedule(0.7, window=(0.5, 1.0))),
    ]
    attach(components, attachments)
    return components, attachments


def drawn(components: Components, weighting: Weighting | None, steps: int = STEPS) -> np.ndarray:
    return sample(
        components, ["a creature", "a dog"], [1, 2], steps=steps, guidance_scale=2.0, negative_prompt="",
        weighting=weighting, batch=2,
    )  # fmt: skip


def predictions(
    components: Components, attachments: list[Attachment], executor: str, combine: str = "sum"
) -> list[Tensor]:
    """What the UNet says in each step, with each of its rows."""
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    said = []
    with (
        torch.no_grad(),
        acting(components, attachments, STEPS, combine=combine, every=2, executor=executor) as weights,
    ):
        assert weights is not None
        for step in weights.steps:
            for row, text_row in step:
                weights.use_text(text_row)
                prompts = encode_prompts(components, ["a creature", "a dog"])
                weights.use(row)
                said.append(Denoiser(components)(latents, torch.tensor(300), prompts))
    return said


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("combine", ["sum", "switch", "composite", "k_lora"])
@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_all_executors_say_the_same(tmp_path: Path, kind: str, combine: str, dora: bool) -> None:
    components, attachments = attached(tmp_path, kind, dora)
    said = [predictions(components, attachments, executor, combine) for executor in EXECUTORS]
    for one, two, three in zip(*said, strict=True):
        assert ((one - two).norm() / one.norm(), (one - three).norm() / one.norm()) < (1e-4, 1e-4)
    assert len({float(each.sum()) for each in said[0]}) > 1


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_said_is_what_branches_at_these_weights_say(tmp_path: Path, executor: str, dora: bool) -> None:
    """The dense sum of `weight · change` in every layer, by the branches that training has."""
    components, attachments = attached(tmp_path, dora=dora)
    said = predictions(components, attachments, executor)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    for step, progress in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        zorp, ink = 0.2 + 0.8 * progress, 0.7 * (progress >= 0.5)
        set_weights(components, lambda target, name, z=zorp, i=ink: (  # type: ignore[misc]  # mypy cannot type a lambda's default
            i if name == "ink" else z * (0.5 if "mid_block" in target else 1.0)))  # fmt: skip
        with torch.no_grad():
            prompts = encode_prompts(components, ["a creature", "a dog"])
            truth = Denoiser(components)(latents, torch.tensor(300), prompts)
        torch.testing.assert_close(said[step], truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("executor", ["auto", *EXECUTORS])
def test_the_base_is_bit_for_bit_what_it_was(tmp_path: Path, executor: str) -> None:
    components, attachments = attached(tmp_path)
    before = {name: each.clone() for name, each in components.unet.state_dict().items()}
    places = {name: each.data_ptr() for name, each in components.unet.named_parameters()}
    with acting(components, attachments, STEPS, combine="sum", every=1, executor=executor) as weighting:
        drawn(components, weighting)
    after = components.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert {name: each.data_ptr() for name, each in components.unet.named_parameters()} == places


def test_only_what_changes_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_pipeline.rendering import executors

    components, attachments = attached(tmp_path)
    attachments[0] = replace(attachments[0], schedule=schedule(1.0))
    attachments[1] = replace(attachments[1], schedule=schedule([(0.0, 0.0), (1.0, 1.0)], blocks={"*attn*": 0.0}))
    made: list[str] = []
    original = executors.fused_weight

    def noted(stack: executors.Stack, *rest: Any) -> Tensor:
        made.append(stack.path)
        return original(stack, *rest)

    monkeypatch.setattr(executors, "fused_weight", noted)
    counts = {}
    for executor in ("fuse", "cache"):
        made.clear()
        with acting(components, attachments, STEPS, combine="sum", every=1, executor=executor) as weighting:
            for _ in range(2):
                drawn(components, weighting)
        counts[executor] = (sum("attn" in path for path in made), sum("attn" not in path for path in made))
    attentions = len({path for path in made if "attn" in path})
    others = len({path for path in made if "attn" not in path})
    assert counts["fuse"] == (attentions, 2 * STEPS * others)
    assert counts["cache"] == (attentions, STEPS * others)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_sampler_of_second_order_sees_one_row_a_step(tmp_path: Path) -> None:
    components, attachments = attached(tmp_path)
    components = replace(components, scheduler=diffusers.HeunDiscreteScheduler(prediction_type="v_prediction"))
    used: list[int] = []
    with acting(components, attachments, STEPS, combine="sum", every=1, executor="cache") as weighting:
        assert weighting is not None

        def use(row: int) -> None:
            used.append(row)

        drawn(components, replace(weighting, use=use))
    assert used == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_prompts_are_read_anew_for_every_weight_in_the_text_encoder(tmp_path: Path) -> None:
    components, attachments = attached(tmp_path)
    schedules = {each.name: each.schedule for each in attachments}
    adapters = {each.name: each.adapter for each in attachments}
    with weighted(components, adapters, schedules, STEPS) as weighting:
        assert len({text for step in weighting.steps for _, text in step}) == STEPS
    schedules["zorp"] = replace(schedules["zorp"], blocks={"BASE": 0.0})
    with weighted(components, adapters, schedules, STEPS) as weighting:
        assert len({text for step in weighting.steps for _, text in step}) == 2
