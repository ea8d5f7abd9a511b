"""Into a model and out again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import CorruptError, ParamsError
from lora_pipeline.injection.inject import (
    collapse,
    collect,
    inject_adapter,
    inject_new,
    injected_layers,
    remove,
    select_targets,
    set_weights,
    trainable,
)

Randomise = Callable[[dict[str, nn.Parameter]], None]
ALL = ["unet.block.conv", "unet.block.point", "unet.block.to_q", "unet.block.to_out.0"]


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=generator)


@pytest.fixture
def adapter(model: nn.Module, generator: torch.Generator, randomise: Randomise) -> Adapter:
    trained = copy.deepcopy(model)
    inject_new(trained, "unet", ALL, "new", rank=3, alpha=1.5, generator=generator)
    randomise(trainable(trained))
    return Adapter(collect(trained, "unet", "new"))


def test_globs_select_layers_in_the_models_order(model: nn.Module) -> None:
    assert select_targets(model, "unet", ["*"]) == ALL
    assert select_targets(model, "unet", ["*.to_*", "block.conv"]) == [ALL[0], ALL[2], ALL[3]]
    assert select_targets(model, "unet", []) == []
    assert select_targets(model, "text_encoder", ["*q"]) == ["text_encoder.text_model.block.to_q"]


def test_a_glob_that_matches_nothing_is_refused(model: nn.Module) -> None:
    with pytest.raises(ParamsError, match="attn9"):
        select_targets(model, "unet", ["*", "*attn9*"])


def test_targets_are_the_same_with_and_without_the_text_model_level(model: nn.Module) -> None:
    wrapped = nn.Module()
    wrapped.text_model = copy.deepcopy(model)
    targets = select_targets(wrapped, "text_encoder", ["*"])
    assert targets == select_targets(model, "text_encoder", ["*"])
    for each in (wrapped, model):
        inject_new(each, "text_encoder", targets, "a", rank=1, alpha=1.0, generator=torch.Generator())
        assert list(collect(each, "text_encoder", "a")) == targets


def test_new_branches_change_nothing_and_start_as_documented(
    model: nn.Module, inputs: Tensor, generator: torch.Generator
) -> None:
    before = model(inputs)
    inject_new(model, "unet", ALL, "a", rank=4, alpha=8.0, generator=generator)
    torch.testing.assert_close(model(inputs), before)
    with torch.no_grad():
        assert torch.equal(model(inputs), before)
    factors = collect(model, "unet", "a")
    assert list(factors) == ALL
    for each in factors.values():
        bound = each.down[0].numel() ** -0.5
        assert each.rank == 4
        assert each.alpha == 8.0
        assert 0.5 * bound < float(each.down.abs().max()) <= bound
        assert not each.up.any()


def test_the_start_is_decided_by_the_generator(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    for each in (model, other):
        inject_new(each, "unet", ALL, "a", rank=2, alpha=1.0, generator=torch.Generator().manual_seed(5))
    for target, factors in collect(model, "unet", "a").items():
        assert torch.equal(factors.down, collect(other, "unet", "a")[target].down)


def test_only_the_factors_are_trainable(model: nn.Module, generator: torch.Generator) -> None:
    model.requires_grad_(True)
    inject_new(model, "unet", ["unet.block.to_q"], "a", rank=2, alpha=1.0, generator=generator)
    assert list(trainable(model)) == ["unet.block.to_q.a.down", "unet.block.to_q.a.up"]
    layer = next(iter(injected_layers(model)))
    assert not layer.base.weight.requires_grad


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_no_layer_has_is_refused(model: nn.Module, generator: torch.Generator, rank: int) -> None:
    with pytest.raises(ParamsError, match="rank"):
        inject_new(model, "unet", ["unet.block.to_q"], "a", rank=rank, alpha=1.0, generator=generator)
    assert not list(injected_layers(model))


def test_collected_factors_give_the_same_outputs(model: nn.Module, inputs: Tensor, adapter: Adapter) -> None:
    plain = model(inputs)
    inject_adapter(model, "unet", adapter, "a")
    output = model(inputs)
    assert not torch.allclose(output, plain)
    changed = copy.deepcopy(model)
    remove(changed)
    for target, factors in adapter.factors.items():
        changed.get_parameter(target.removeprefix("unet.") + ".weight").data += factors.delta()
    torch.testing.assert_close(output, changed(inputs), rtol=1e-4, atol=1e-4)


def test_loaded_adapters_are_frozen(model: nn.Module, adapter: Adapter) -> None:
    inject_adapter(model, "unet", adapter, "a")
    assert not trainable(model)


def test_removing_gives_back_the_same_objects(model: nn.Module, inputs: Tensor, adapter: Adapter) -> None:
    before, modules = model(inputs), dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_adapter(model, "unet", adapter, "a")
    inject_adapter(model, "unet", adapter, "b")
    remove(model)
    assert all(modules[name] is module for name, module in model.named_modules())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(inputs), before)


@pytest.mark.parametrize("weights", [(0.7, -0.3), (0.0, 1.0), (2.0, 2.0)])
def test_collapsing_keeps_the_outputs(
    model: nn.Module, inputs: Tensor, adapter: Adapter, weights: tuple[float, float]
) -> None:
    inject_adapter(model, "unet", adapter, "a")
    inject_adapter(model, "unet", Adapter({ALL[2]: adapter.factors[ALL[2]].scaled(3.0)}), "b")
    set_weights(model, {"a": weights[0], "b": weights[1], "absent": 9.0})
    before = model(inputs)
    collapse(model)
    assert not list(injected_layers(model))
    torch.testing.assert_close(model(inputs), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_weights_by_target_and_name(model: nn.Module, inputs: Tensor, adapter: Adapter) -> None:
    inject_adapter(model, "unet", adapter, "a")
    set_weights(model, lambda target, name: 0.25 if (target, name) == (ALL[2], "a") else 0.0)
    output = model(inputs)
    remove(model)
    inject_adapter(model, "unet", Adapter({ALL[2]: adapter.factors[ALL[2]].scaled(0.25)}), "only")
    assert torch.equal(output, model(inputs))
    set_weights(model, {})
    assert torch.equal(output, model(inputs))


def test_an_adapter_that_does_not_fit_leaves_the_model_alone(model: nn.Module, adapter: Adapter) -> None:
    unknown = LoraFactors(torch.ones(1, 6), torch.ones(6, 1), 1.0)
    for factors in ({"unet.block.nowhere": unknown}, {"unet.block.to_out.0": unknown}):
        with pytest.raises(CorruptError, match=r"unet\.block"):
            inject_adapter(model, "unet", Adapter(dict(adapter.factors) | factors), "a")
        assert not list(injected_layers(model))


def test_factors_of_the_other_model_are_passed_over(model: nn.Module) -> None:
    other = LoraFactors(torch.ones(1, 6), torch.ones(6, 1), 1.0)
    inject_adapter(model, "unet", Adapter({"text_encoder.text_model.a": other}), "a")
    assert not list(injected_layers(model))


def test_linear_factors_go_into_a_1x1_convolution(model: nn.Module, inputs: Tensor) -> None:
    factors = LoraFactors(torch.ones(1, 6), torch.ones(6, 1), 1.0)
    inject_adapter(model, "unet", Adapter({"unet.block.point": factors}), "a")
    output = model(inputs)
    remove(model)
    model.get_parameter("block.point.weight").data += factors.delta()[..., None, None]
    torch.testing.assert_close(output, model(inputs), rtol=1e-4, atol=1e-4)


def test_a_name_is_used_once(model: nn.Module, adapter: Adapter, generator: torch.Generator) -> None:
    inject_adapter(model, "unet", adapter, "a")
    with pytest.raises(ParamsError, match="a"):
        inject_adapter(model, "unet", adapter, "a")
    with pytest.raises(ParamsError, match="a"):
        inject_new(model, "unet", ALL[:1], "a", rank=1, alpha=1.0, generator=generator)
    inject_new(model, "unet", ALL[:1], "b", rank=1, alpha=1.0, generator=generator)
    assert collect(model, "unet", "b").keys() == {ALL[0]}


def test_an_adapter_of_another_family_is_told_so() -> None:
    attention = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(768, 6)})})
    other = Adapter({"unet.attn2.to_k": LoraFactors(torch.ones(1, 1024), torch.ones(6, 1), 1.0)})
    with pytest.raises(CorruptError, match=r"SD2 \(width 1024\), the base is SD1 \(width 768\)"):
        inject_adapter(attention, "unet", other, "a")
