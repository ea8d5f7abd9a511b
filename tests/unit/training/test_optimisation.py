"""Optimisers by name and path, against the papers' rules written out, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_pipeline.errors import MissingError, ParamsError
from lora_pipeline.training.optimisation import groups_of, make_optimiser
from lora_pipeline.training.state import optimiser_state, restore_optimiser


def section(name: str = "adamw", decay: float = 0.01, **options: Any) -> Any:
    return SimpleNamespace(name=name, weight_decay=decay, options=options)


def moved(params: Any, steps: int, rate: float, rates: dict[str, float] | None = None) -> list[Tensor]:
    """Two parameters after some steps down the bowl (x - 3)²."""
    parameters = {"a": nn.Parameter(torch.tensor([1.0, -2.0])), "b": nn.Parameter(torch.tensor([[0.5]]))}
    optimiser = make_optimiser(params, groups_of(parameters, rates or {}, frozenset({"b"})), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        sum((each - 3.0).square().sum() for each in parameters.values()).backward()  # type: ignore[union-attr]
        optimiser.step()
    return [each.detach() for each in parameters.values()]


def flat(values: list[Tensor]) -> list[float]:
    return torch.cat([each.flatten() for each in values]).tolist()


START, DECAYED = (1.0, -2.0, 0.5), (True, True, False)


def test_lion_is_its_paper_s_algorithm() -> None:
    first, second, rate, decay = 0.8, 0.95, 0.1, 0.2
    expected, means = list(START), [0.0] * 3
    for _ in range(7):
        for index, (value, mean) in enumerate(zip(expected, means, strict=True)):
            gradient = 2 * (value - 3)
            direction = math.copysign(1.0, first * mean + (1 - first) * gradient)
            expected[index] = value - rate * (direction + decay * value * DECAYED[index])
            means[index] = second * mean + (1 - second) * gradient
    found = flat(moved(section("lion", decay, betas=[first, second]), 7, rate))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.0, 0.25)])
def test_prodigy_is_its_paper_s_algorithm(rates: tuple[float, float]) -> None:
    first, second, eps, d = 0.9, 0.99, 1e-8, 1e-3
    gammas = [rates[0], rates[0], rates[1]]
    x, m, v, s, r, ds = list(START), [0.0] * 3, [0.0] * 3, [0.0] * 3, 0.0, [d]
    for _ in range(30):
        g = [2 * (each - 3) for each in x]
        m = [first * a + (1 - first) * d * b for a, b in zip(m, g, strict=True)]
        v = [second * a + (1 - second) * d * d * b * b for a, b in zip(v, g, strict=True)]
        root = math.sqrt(second)
        inner = sum(c * b * (a0 - a) for c, b, a0, a in zip(gammas, g, START, x, strict=True))
        r = root * r + (1 - root) * d * d * inner
        s = [root * a + (1 - root) * c * d * d * b for a, b, c in zip(s, g, gammas, strict=True)]
        x = [a - c * d * b / (math.sqrt(w) + d * eps) for a, b, w, c in zip(x, m, v, gammas, strict=True)]
        d = max(d, r / sum(map(abs, s)))
        ds.append(d)
    found = flat(moved(section("prodigy", 0.0, betas=[first, second], d0=1e-3), 30, 1.0, {"b": rates[1]}))
    assert ds[-1] > 50 * ds[0]  # it does find a rate
    assert found == pytest.approx(x, rel=1e-4)


def test_prodigy_s_decay_is_decoupled() -> None:
    d, rate = 1e-3, 0.5
    with_decay, without = (flat(moved(section("prodigy", decay, d0=d), 1, rate)) for decay in (0.1, 0.0))
    expected = [b - rate * d * 0.1 * x * decayed for b, x, decayed in zip(without, START, DECAYED, strict=True)]
    assert with_decay == pytest.approx(expected, rel=1e-6)


def test_adamw_is_torch_s_fused_one_and_leaves_some_undecayed() -> None:
    parameters = [nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([[0.5]]))]
    groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, fused=True)
    for _ in range(5):
        optimiser.zero_grad()
        sum((each - 3.0).square().sum() for each in parameters).backward()  # type: ignore[union-attr]
        optimiser.step()
    found = moved(section(decay=0.3, betas=[0.8, 0.9]), 5, 0.1)
    assert all(torch.equal(a, b.detach()) for a, b in zip(found, parameters, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "lion", "torch.optim.NAdam"])
def test_every_optimiser_finds_the_bottom_of_a_bowl(name: str) -> None:
    assert flat(moved(section(name, 0.0), 250, 1.0 if name == "prodigy" else 0.05)) == pytest.approx([3.0] * 3, abs=0.3)


@pytest.mark.parametrize("name", ["adamw", "lion", "torch.optim.SGD"])
def test_a_group_s_rate_multiplies_its_steps(name: str) -> None:
    whole, half = moved(section(name, 0.0), 1, 0.1), moved(section(name, 0.0), 1, 0.1, {"b": 0.5})
    assert torch.equal(whole[0], half[0])
    torch.testing.assert_close(half[1] - 0.5, (whole[1] - 0.5) / 2)


@pytest.mark.parametrize(
    ("params", "where", "says"),
    [
        (section("adam"), "optimiser.name", "there is no 'adam'"),
        (section("torch.nn.Linear"), "optimiser.name", "no class of torch.optim.Optimizer"),
        (section("torch.optim.Nothing"), "optimiser.name", "no class of torch.optim.Optimizer"),
        (section("torch.optim.LBFGS"), "optimiser.name", "several times a step"),
        (section("adafactor", betas=[0.9, 0.99]), "optimiser.options", "adafactor has no 'betas'"),
        (section(lr=1.0), "optimiser.options", "'lr' has a key of its own"),
        (section(betas=[2.0, 0.9]), "optimiser.options", "refuses them"),
        (section(betas="high"), "optimiser.options", "refuses them"),
        (section("prodigy", d0=0.0), "optimiser.options", "out of range"),
        (section("torch.optim.Rprop"), "optimiser.weight_decay", "has none"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(params: Any, where: str, says: str) -> None:
    with pytest.raises(ParamsError, match=says) as caught:
        moved(params, 1, 0.1)
    assert caught.value.where == where


def test_an_option_of_null_is_the_class_s_own() -> None:
    assert flat(moved(section("adafactor", betas=None), 3, 0.1)) == flat(moved(section("adafactor"), 3, 0.1))


def test_a_package_that_is_not_there_is_told_with_its_remedy() -> None:
    with pytest.raises(MissingError) as caught:
        moved(section("no_such_package.Fast"), 1, 0.1)
    assert caught.value.fix == "pip install no_such_package, or use adamw"


@pytest.mark.parametrize("name", ["adamw", "prodigy", "lion"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_restored_optimiser_goes_on_as_it_would_have(name: str, memory_format: torch.memory_format) -> None:
    """Whatever the order in which a parameter lies in memory: fused kernels pair it with its moments as they lie."""
    source = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 4, 5, 2, generator=source), torch.randn(4, 3, 4, 5, 2, generator=source)

    def fresh(values: Tensor) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        parameters = {"a": nn.Parameter(values.clone().contiguous(memory_format=memory_format))}
        return parameters, make_optimiser(section(name), groups_of(parameters, {}, frozenset()), 0.1)

    def steps(parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            parameters["a"].grad = gradients[number].contiguous(memory_format=memory_format)
            optimiser.step()

    straight = fresh(start)
    steps(*straight, range(4))
    before = fresh(start)
    steps(*before, range(2))
    tensors: dict[str, Tensor] = {}
    document = optimiser_state(before[1], before[0], tensors)
    stored = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}  # as files hold them
    after = fresh(before[0]["a"].detach())
    restore_optimiser(after[1], after[0], document, stored)
    steps(*after, range(2, 4))
    assert torch.equal(after[0]["a"], straight[0]["a"])
