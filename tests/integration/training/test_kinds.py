"""Kinds of adapters in whole runs; PEFT as an independent truth for their gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import Tensor, nn
from train_values import train_params

from lora_pipeline.adapters import load_adapter, save_adapter
from lora_pipeline.errors import ParamsError
from lora_pipeline.injection import inject
from lora_pipeline.injection.inject import injected_layers
from lora_pipeline.injection.kinds import maker
from lora_pipeline.pretrained.adapted import add_adapter
from lora_pipeline.pretrained.components import Components
from lora_pipeline.training.tuning import Task, Tuned, tune

pytestmark = pytest.mark.filterwarnings("default::FutureWarning")
LORA = {"method": "lora", "adapter.text_encoder_targets": ["*q_proj"]}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs


def layer_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(24, 40, 3, padding=1, stride=2) if name == "conv" else nn.Linear(24, 40)


# Ours and PEFT's names of the same parameters.
LORA_NAMES = {"down": "lora_A.ours.weight", "up": "lora_B.ours.weight"}
PEFT: dict[str, tuple[Any, dict[str, str]]] = {
    "lora": (peft.LoraConfig, LORA_NAMES),
    "rslora": (peft.LoraConfig, LORA_NAMES),
    "dora": (peft.LoraConfig, {**LORA_NAMES, "magnitude": "lora_magnitude_vector.ours.weight"}),
    "loha": (peft.LoHaConfig, {"other_up": "hada_w1_a.ours", "other_down": "hada_w1_b.ours", "up": "hada_w2_a.ours",
                               "down": "hada_w2_b.ours"}),
    "lokr": (peft.LoKrConfig, {"left": "lokr_w1.ours", "up": "lokr_w2_a.ours", "down": "lokr_w2_b.ours"}),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("kind", PEFT)
def test_gradients_are_those_of_peft(kind: str, layer: str) -> None:
    config, names = PEFT[kind]
    alpha = 3.0 * (2.0**0.5 if kind == "rslora" else 1.0)
    ours = Net(layer_of(layer).requires_grad_(False))
    make = maker("lora" if kind == "rslora" else kind, "kaiming", None)
    source = torch.Generator().manual_seed(3)
    inject.inject_new(ours, "unet", ["unet.layer"], "a", rank=2, alpha=alpha, generator=source, make=make)
    [injected] = injected_layers(ours)
    branch = injected.branches["a"]
    for parameter in branch.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source)
    rank = {"r": 2, ("lora_alpha" if config is peft.LoraConfig else "alpha"): 3.0}
    more = {"use_effective_conv2d": False} if kind in ("loha", "lokr") else {}
    theirs = peft.get_peft_model(
        Net(layer_of(layer)), config(target_modules=["layer"], **rank, **more, **OPTIONS.get(kind, {})), "ours"
    )
    learnt = dict(theirs.named_parameters())
    start = "base_model.model.layer."
    for side, name in names.items():
        parameter = learnt[start + name]
        parameter.data = getattr(branch, side).detach().reshape(parameter.shape).clone()
    inputs = torch.randn((3, 24, 6, 6) if layer == "conv" else (3, 5, 24), generator=source).requires_grad_()
    outputs = [model(inputs) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(outputs[0].square().sum(), [inputs, *(getattr(branch, side) for side in names)])
    truth = torch.autograd.grad(outputs[1].square().sum(), [inputs, *(learnt[start + name] for name in names.values())])
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one.flatten(), other.flatten(), rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def run(folder: Path, task: Task, name: str) -> tuple[Tuned, Components]:
    parts = tiny.components(folder / "tokenizer")
    (folder / name).mkdir()
    return tune(parts, task, folder / name, lambda *_: None), parts


def outputs(parts: Components) -> Tensor:
    source = torch.Generator().manual_seed(5)
    noisy, words = (torch.randn(shape, generator=source) for shape in ((2, 4, 4, 4), (2, 24, tiny.WIDTH)))
    with torch.no_grad():
        said: Tensor = parts.unet(noisy, torch.tensor([3, 500]), words).sample
    return said


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "pissa"])
def test_each_kind_learns_and_the_saved_adapter_does_what_was_learnt(tmp_path: Path, kind: str) -> None:
    changes = {"adapter.init": "pissa"} if kind == "pissa" else {"adapter.kind": kind}
    task = tiny.task(tmp_path, {**LORA, **changes, "samples.every": 4})
    parts, seen = tiny.components(tmp_path / "tokenizer"), []
    (tmp_path / "work").mkdir()
    before = outputs(parts)
    tuned = tune(parts, task, tmp_path / "work", lambda *_: None, look=lambda _, mine: seen.append(outputs(mine)))
    torch.testing.assert_close(outputs(parts), before, rtol=0.0, atol=0.0)
    assert bool(tuned.magnitudes) == (kind == "dora")
    save_adapter(tuned.adapter({"base": "x"}), tmp_path / "learnt.safetensors")
    add_adapter(parts, load_adapter(tmp_path / "learnt.safetensors"), "learnt")
    assert (outputs(parts) - before).norm() > 1e-4 * before.norm()
    torch.testing.assert_close(outputs(parts), seen[-1], rtol=1e-3, atol=1e-4)


def test_dropout_changes_what_is_learnt_and_checkpointing_drops_the_same(tmp_path: Path) -> None:
    shares = {"adapter.dropout": 0.3, "adapter.rank_dropout": 0.3, "adapter.module_dropout": 0.3}
    plain = tiny.task(tmp_path, LORA)
    told = [run(tmp_path, plain, "plain")[0]]
    for name, changes in (("dropped", {}), ("again", {}), ("checkpointed", {"engine.gradient_checkpointing": True})):
        params = train_params({**LORA, **shares, **changes})
        told.append(run(tmp_path, dataclasses.replace(plain, params=params), name)[0])
    losses = [[each.loss for each in tuned.losses] for tuned in told]
    assert losses[1] == losses[2] != losses[0]
    assert losses[3] == pytest.approx(losses[1], rel=1e-5)


def test_no_change_is_longer_than_it_may_be(tmp_path: Path) -> None:
    task = tiny.task(tmp_path, LORA)
    free, _ = run(tmp_path, task, "free")
    longest = max(float(each.delta().norm()) for each in free.factors.values())
    params = train_params({**LORA, "adapter.max_norm": longest / 2})
    held, _ = run(tmp_path, dataclasses.replace(task, params=params), "held")
    assert max(float(each.delta().norm()) for each in held.factors.values()) == pytest.approx(longest / 2, rel=1e-3)


@pytest.mark.parametrize("key", ["adapter.dropout", "adapter.rank_dropout", "adapter.module_dropout"])
def test_dropout_of_what_stands_for_the_base_itself_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ParamsError, match=r"adapter\.init"):
        run(tmp_path, tiny.task(tmp_path, {**LORA, "adapter.init": "pissa", key: 0.1}), "x")
