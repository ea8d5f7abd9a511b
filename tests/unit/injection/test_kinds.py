"""Branches of every kind, against the layer with their change added to its weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.dora import dora_change
from lora_pipeline.adapters.formats.lycoris import module_factors
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.errors import ParamsError
from lora_pipeline.injection import inject
from lora_pipeline.injection.branches import LohaBranch, LokrBranch, LoraBranch, PissaBranch
from lora_pipeline.injection.chance import Chance
from lora_pipeline.injection.kinds import Make, maker
from lora_pipeline.injection.layers import InjectedLayer

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "small": lambda: nn.Linear(12, 8), "bare": lambda: nn.Linear(12, 8, bias=False),
    "large": lambda: nn.Linear(300, 260), "conv": lambda: nn.Conv2d(12, 8, 3, padding=1, stride=2),
}  # fmt: skip
KINDS = {
    "lora": maker("lora", "kaiming", None), "pissa": maker("lora", "pissa", None),
    "dora": maker("dora", "orthogonal", None), "loha": maker("loha", "kaiming", None),
    "lokr": maker("lokr", "kaiming", None), "lokr of a small block": maker("lokr", "kaiming", 2),
}  # fmt: skip


def made(layer: str, make: Make, chance: Chance | None = None) -> tuple[nn.Module, InjectedLayer, LoraBranch]:
    """The plain layer and the same with a branch of rank 2, both of float32."""
    source = torch.Generator().manual_seed(0)
    base = LAYERS[layer]()
    for parameter in base.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source) / 4
    model = nn.Sequential(base.requires_grad_(False))
    options: dict[str, Any] = {"rank": 2, "alpha": 3.0, "generator": source, "make": make, "chance": chance}
    inject.inject_new(model, "unet", ["unet.0"], "a", **options)
    injected = model[0]
    assert isinstance(injected, InjectedLayer)
    return base, injected, injected.branches["a"]


def inputs_of(layer: str) -> Tensor:
    shape = {"conv": (3, 12, 6, 6), "large": (3, 5, 300)}.get(layer, (3, 5, 12))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def learn(branch: LoraBranch) -> None:
    """As if something had been learnt."""
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source) / 3)


def with_change(base: nn.Module, inputs: Tensor, change: Tensor) -> Tensor:
    plain = base.weight
    assert isinstance(plain, Tensor)
    changed = {**dict(base.named_parameters()), "weight": plain + change}
    output: Tensor = torch.func.functional_call(base, changed, inputs)
    return output


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_branch_changes_nothing(kind: str, layer: str) -> None:
    base, injected, branch = made(layer, KINDS[kind])
    inputs = inputs_of(layer)
    torch.testing.assert_close(injected(inputs), base(inputs), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in branch.parameters())


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_the_change_told_is_the_change_made(kind: str, layer: str, learning: bool, weight: float) -> None:
    base, injected, branch = made(layer, KINDS[kind])
    learn(branch)
    branch.weight = weight
    change = inject.plain(injected, branch).delta() * weight
    assert change.norm() > 0.1
    inputs = inputs_of(layer)
    with torch.set_grad_enabled(learning):
        output = injected(inputs)
    expected = with_change(base, inputs, change)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("layer", ["small", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_half_precision_base_rounds_once(kind: str, dtype: torch.dtype, layer: str) -> None:
    base, injected, branch = made(layer, KINDS[kind])
    learn(branch)
    inputs = inputs_of(layer).to(dtype)
    base.to(dtype)
    change = inject.plain(injected, branch).delta()
    output = injected(inputs)
    assert output.dtype == dtype
    exact = with_change(base.float(), inputs.float(), change)
    bound = 4 * torch.finfo(dtype).eps * float(exact.detach().abs().max())
    torch.testing.assert_close(output.float(), exact, rtol=0.0, atol=bound)


def test_hadamard_and_kronecker_are_what_their_names_say() -> None:
    _, _, loha = made("conv", KINDS["loha"])
    _, _, lokr = made("conv", KINDS["lokr"])
    assert isinstance(loha, LohaBranch)
    assert isinstance(lokr, LokrBranch)
    for each in (loha, lokr):
        learn(each)
    one = LoraFactors(loha.down, loha.up, 2.0).delta() * LoraFactors(loha.other_down, loha.other_up, 2.0).delta()
    torch.testing.assert_close(loha.factors().delta(), 1.5 * one, rtol=1e-4, atol=1e-5)
    assert lokr.left.shape == (2, 3)
    right = LoraFactors(lokr.down, lokr.up, 2.0).delta()
    blocks = torch.kron(lokr.left[:, :, None, None], right)
    torch.testing.assert_close(lokr.factors().delta(), 1.5 * blocks, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["small", "conv"])
def test_programs_that_know_the_kind_would_find_the_same_change(layer: str) -> None:
    """By the keys of LyCORIS."""
    _, _, loha = made(layer, KINDS["loha"])
    _, _, lokr = made(layer, KINDS["lokr"])
    assert isinstance(loha, LohaBranch)
    assert isinstance(lokr, LokrBranch)
    for each in (loha, lokr):
        learn(each)
    alpha = {"alpha": torch.tensor(3.0)}
    stored = {
        "hada_w1_a": loha.other_up.flatten(1), "hada_w1_b": loha.other_down.flatten(1),
        "hada_w2_a": loha.up.flatten(1), "hada_w2_b": loha.down.flatten(1), **alpha,
    }  # fmt: skip
    name = "unet.conv1" if layer == "conv" else "unet.to_q"
    found, _, _ = module_factors(name, {key: value.detach() for key, value in stored.items()})
    assert found is not None
    torch.testing.assert_close(found.delta(), loha.factors().delta(), rtol=1e-4, atol=1e-5)
    stored = {"lokr_w1": lokr.left, "lokr_w2_a": lokr.up.flatten(1), "lokr_w2_b": lokr.down.flatten(1), **alpha}
    found, _, _ = module_factors(name, {key: value.detach() for key, value in stored.items()})
    assert found is not None
    torch.testing.assert_close(found.delta(), lokr.factors().delta(), rtol=1e-4, atol=1e-5)


def test_pissa_starts_from_the_largest_part_of_the_weight() -> None:
    base, _, branch = made("small", KINDS["pissa"])
    assert isinstance(base, nn.Linear)
    left, values, right = torch.linalg.svd(base.weight)
    torch.testing.assert_close(branch.scale * branch.up @ branch.down, left[:, :2] * values[:2] @ right[:2])
    assert isinstance(branch, PissaBranch)
    assert branch.factors().rank == 4


def test_dora_starts_from_the_norms_of_rows_and_is_the_formulas() -> None:
    base, injected, branch = made("conv", KINDS["dora"])
    assert isinstance(base, nn.Conv2d)
    assert branch.magnitude is not None
    torch.testing.assert_close(branch.magnitude.flatten(), base.weight.flatten(1).norm(dim=1))
    learn(branch)
    change = dora_change("x", base.weight, branch.factors(), branch.magnitude.detach())
    inputs = inputs_of("conv")
    torch.testing.assert_close(injected(inputs), with_change(base, inputs, change.float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_row", [True, False])
def test_a_loaded_dora_acts_as_it_is_at_every_weight(by_row: bool) -> None:
    base, _, branch = made("small", KINDS["dora"])
    learn(branch)
    assert isinstance(base, nn.Linear)
    magnitude = torch.rand(8, 1) if by_row else torch.rand(1, 12)
    target = "unet.mid_block.attentions.0.proj_in"
    model = nn.ModuleDict(
        {"mid_block": nn.ModuleDict({"attentions": nn.ModuleList([nn.ModuleDict({"proj_in": base})])})}
    )
    inject.inject_adapter(model, "unet", Adapter({target: branch.factors()}, magnitudes={target: magnitude}), "a")
    layer = model.get_submodule("mid_block.attentions.0.proj_in")
    inject.set_weights(model, {"a": 0.7})
    change = 0.7 * dora_change("x", base.weight, branch.factors(), magnitude)
    inputs = inputs_of("small")
    torch.testing.assert_close(layer(inputs), with_change(base, inputs, change.float()), rtol=1e-4, atol=1e-5)


def test_collapsing_a_dora_keeps_what_it_does() -> None:
    _, injected, branch = made("conv", KINDS["dora"])
    learn(branch)
    inputs, model = inputs_of("conv"), nn.Sequential(injected)
    expected = model(inputs)
    inject.collapse(model)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_change_that_is_too_long_is_held(kind: str) -> None:
    _, _, branch = made("conv", KINDS[kind])
    learn(branch)
    before = branch.factors().delta()
    for most in (2 * float(before.norm()), 0.3 * float(before.norm())):
        branch.hold(most)
        after = branch.factors().delta()
        expected = before * min(1.0, most / float(before.norm()))
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def chance(**shares: float) -> Chance:
    inputs, ranks, branches = (shares.get(name, 0.0) for name in ("inputs", "ranks", "branches"))
    return Chance(inputs, ranks, branches, lambda batch, _: torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("share", [{"inputs": 0.5}, {"ranks": 0.5}, {"branches": 0.5}])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa"])
def test_what_is_left_out_depends_on_the_batch_alone_and_evens_out(
    kind: str, share: dict[str, float], layer: str
) -> None:
    held = chance(**share)
    _, injected, branch = made(layer, KINDS[kind], held)
    learn(branch)
    inputs = inputs_of(layer)
    whole = injected(inputs).detach()
    seen = []
    for batch in range(400 if layer == "small" else 8):
        held.batch = batch
        seen.append(injected(inputs).detach())
        torch.testing.assert_close(injected(inputs), seen[-1], rtol=0.0, atol=0.0)
    assert len({float(each.double().sum()) for each in seen}) > 1
    held.batch = None
    torch.testing.assert_close(injected(inputs), whole, rtol=0.0, atol=0.0)
    if layer == "small" and kind == "lora" and "branches" not in share:
        mean, spread = torch.stack(seen).mean(0), torch.stack(seen).std(0)
        assert ((mean - whole).abs() < 5 * spread / math.sqrt(len(seen)) + 1e-5).all()


@settings(max_examples=20)
@given(share=st.floats(0.05, 0.95))
def test_what_stays_is_scaled_up_by_what_went(share: float) -> None:
    held = chance()
    held.batch = 3
    factors = held.kept(share, "x", torch.zeros(20_000))
    assert float((factors == 0).float().mean()) == pytest.approx(share, abs=0.02)
    torch.testing.assert_close(factors[factors > 0], torch.tensor(1 / (1 - share)).expand(int((factors > 0).sum())))


@pytest.mark.parametrize(
    ("kind", "init", "factor", "told"),
    [
        ("lora", "kaiming", 4, "is of kind lokr, and kind is lora"), ("loha", "normal", None, "a start of its own"),
        ("dora", "pissa", None, "is of kind lora, and kind is dora"),
    ],
)  # fmt: skip
def test_what_a_kind_does_not_have_is_refused(kind: str, init: str, factor: int | None, told: str) -> None:
    with pytest.raises(ParamsError, match=told):
        maker(kind, init, factor)


def test_a_rank_that_the_right_block_does_not_have_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"does not fit unet\.0") as refusal:
        inject.inject_new(
            nn.Sequential(nn.Linear(16, 16)), "unet", ["unet.0"], "a", rank=5, alpha=1.0,
            generator=torch.Generator().manual_seed(0), make=KINDS["lokr"],
        )  # fmt: skip
    assert refusal.value.fix == "use a rank between 1 and 4"
