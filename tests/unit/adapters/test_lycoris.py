"""Modules of every kind, against the full change as the kind defines it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_pipeline.adapters.formats.lycoris import alpha_of, module_factors
from lora_pipeline.errors import CorruptError

LINEAR, CONV = "unet.mid_block.attentions.0.proj_in", "unet.mid_block.resnets.0.conv1"
Tensors = dict[str, Tensor]
Draw = Callable[..., Tensor]


def drawn(seed: int) -> Draw:
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=source)


def loha(draw: Draw, rank: int, rows: int, columns: int) -> tuple[Tensors, Tensor]:
    a, b, c, d = draw(rows, rank), draw(rank, columns), draw(rows, rank), draw(rank, columns)
    whole = (a.double() @ b.double()) * (c.double() @ d.double())
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, whole


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijkl,ip,jr->prkl", core.double(), a.double(), b.double())


def tucker_loha(draw: Draw, rank: int, rows: int, columns: int) -> tuple[Tensors, Tensor]:
    names = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")
    shapes = ((rank, rank, 3, 3), (rank, rows), (rank, columns)) * 2
    each = [draw(*shape) for shape in shapes]
    return dict(zip(names, each, strict=True)), tucker(*each[:3]) * tucker(*each[3:])


def kron(first: Tensor, second: Tensor) -> Tensor:
    return torch.kron(first.double().reshape(*first.shape, *[1] * (second.ndim - 2)), second.double().contiguous())


TINY = torch.finfo(torch.float32).tiny  # below it float32 has few digits


def assert_change(name: str, tensors: Mapping[str, Tensor], whole: Tensor) -> int:
    factors, magnitude, rest = module_factors(name, tensors)
    assert factors is not None
    assert magnitude is None
    assert not rest
    torch.testing.assert_close(factors.delta(), whole.float(), rtol=1e-5, atol=1e-5 * float(whole.abs().max()) + TINY)
    return factors.rank


@given(
    rank=st.integers(1, 5), rows=st.integers(1, 12), columns=st.integers(1, 12), alpha=st.floats(-8, 8),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_a_loha_is_its_product_of_products(rank: int, rows: int, columns: int, alpha: float, seed: int) -> None:
    tensors, whole = loha(drawn(seed), rank, rows, columns)
    got = assert_change(LINEAR, tensors | {"alpha": torch.tensor(alpha)}, whole * alpha / rank)
    assert got == min(rank * rank, rows, columns)


def test_a_loha_of_half_precision_loses_nothing() -> None:
    draw = drawn(0)
    half = {name: tensor.half() for name, tensor in loha(draw, 2, 9, 7)[0].items()}
    a, b, c, d = (half[f"hada_w{index}_{side}"].double() for index in (1, 2) for side in "ab")
    factors, _, _ = module_factors(LINEAR, half)
    assert factors is not None
    up, down = factors.up.double(), factors.down.double()
    # the products of two halves fit a float32 exactly, so only this test's own rounding is left
    torch.testing.assert_close(up @ down * factors.scale, (a @ b) * (c @ d), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_convolutions_loha_gets_its_kernel_back(kernel: bool) -> None:
    tensors, whole = loha(drawn(1), 2, 6, 4 * 9)
    if kernel:
        tensors["hada_w1_b"] = tensors["hada_w1_b"].reshape(2, 4, 3, 3)
    assert_change(LINEAR if kernel else CONV, tensors, whole.reshape(6, 4, 3, 3))


@pytest.mark.parametrize("rank", [2, 5])
def test_a_loha_in_tuckers_form_is_its_product_of_kernels(rank: int) -> None:
    tensors, whole = tucker_loha(drawn(2), rank, 6, 4)
    assert_change(CONV, tensors | {"alpha": torch.tensor([3.0])}, whole * 3.0 / rank)


def decomposed(draw: Draw, side: str, rows: int, columns: int) -> tuple[Tensors, Tensor]:
    a, b = draw(rows, 2), draw(2, columns)
    return {f"lokr_{side}_a": a, f"lokr_{side}_b": b}, a.double() @ b.double()


@pytest.mark.parametrize("first", [True, False], ids=["w1", "w1_a w1_b"])
@pytest.mark.parametrize("second", ["w2", "w2_a w2_b", "conv w2", "conv w2_a w2_b", "conv 4-D w2_b", "conv t2"])
def test_a_lokr_is_its_kronecker_product(first: bool, second: str) -> None:
    draw = drawn(3)
    tensors, one = decomposed(draw, "w1", 3, 4)
    if first:
        one = draw(3, 4)
        tensors = {"lokr_w1": one}
    kernel = (3, 3) if second.startswith("conv") else ()
    more, two = decomposed(draw, "w2", 5, 4 * 9 if kernel else 4)
    two = two.reshape(5, 4, *kernel)
    if second.endswith(" w2") or second == "w2":
        two = draw(5, 4, *kernel)
        more = {"lokr_w2": two}
    elif second == "conv 4-D w2_b":
        more["lokr_w2_b"] = more["lokr_w2_b"].reshape(2, 4, 3, 3)
    elif second == "conv t2":
        more = {"lokr_t2": draw(2, 2, 3, 3), "lokr_w2_a": draw(2, 5), "lokr_w2_b": draw(2, 4)}
        two = tucker(*more.values())
    scale = 1.0 if tensors.keys() | more.keys() == {"lokr_w1", "lokr_w2"} else 3.0 / 2
    whole = kron(one, two) * scale
    rank = assert_change(CONV if kernel else LINEAR, tensors | more | {"alpha": torch.tensor(3.0)}, whole)
    assert rank <= min(15, 16 * (9 if kernel else 1))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (6, 2, 1, 1), (4, 5, 3, 3), (40, 2, 3, 3), (1, 1)])
def test_a_full_change_is_itself_to_the_bit(shape: tuple[int, ...]) -> None:
    change = drawn(4)(*shape)
    factors, _, rest = module_factors(LINEAR, {"diff": change, "diff_b": torch.ones(shape[0])})
    assert factors is not None
    assert torch.equal(factors.delta(), change)
    assert set(rest) == {"diff_b"}


def test_a_lora_keeps_its_numbers_and_its_alpha() -> None:
    draw = drawn(5)
    up, down = draw(6, 2).half(), draw(2, 4).half()
    factors, _, _ = module_factors(LINEAR, {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(8)})
    assert factors is not None
    assert factors.up is up
    assert factors.down is down
    assert factors.alpha == 8.0


def test_a_lora_with_a_kernel_between_its_halves_is_their_product() -> None:
    draw = drawn(6)
    up, mid, down = draw(6, 2, 1, 1), draw(2, 3, 3, 3), draw(3, 4, 1, 1)
    whole = torch.einsum("om,mnkl,ni->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    tensors = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(3.0)}
    assert_change(CONV, tensors, whole * 3.0 / 2)


@pytest.mark.parametrize("scale", [None, torch.tensor([[2.0]])])
def test_alpha_is_the_rank_where_there_is_none(scale: Tensor | None) -> None:
    assert alpha_of("x", scale, 4) == (4.0 if scale is None else 2.0)


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.ones(2), torch.ones(0)])
def test_an_alpha_that_is_no_number_is_refused(alpha: Tensor) -> None:
    with pytest.raises(CorruptError, match="x: its alpha"):
        alpha_of("x", alpha, 4)


@pytest.mark.parametrize(
    ("found", "shaped"), [((6,), (6, 1)), ((6, 1), (6, 1)), ((1, 4), (1, 4)), ((6, 1, 1, 1), (6, 1)), ((1, 6), (6, 1))]
)
def test_a_doras_magnitude_is_by_row_or_by_column(found: tuple[int, ...], shaped: tuple[int, ...]) -> None:
    tensors = loha(drawn(7), 2, 6, 4)[0] | {"dora_scale": torch.rand(found)}
    _, magnitude, _ = module_factors(LINEAR, tensors)
    assert magnitude is not None
    assert magnitude.shape == shaped
    assert torch.equal(magnitude.flatten(), tensors["dora_scale"].flatten())


def test_a_convolutions_magnitude_has_its_dimensions() -> None:
    tensors = tucker_loha(drawn(8), 2, 6, 4)[0] | {"dora_scale": torch.rand(1, 4, 1, 1)}
    _, magnitude, _ = module_factors(CONV, tensors)
    assert magnitude is not None
    assert magnitude.shape == (1, 4, 1, 1)


def test_what_changes_no_weight_is_handed_on() -> None:
    tensors = {"w_norm": torch.ones(3), "b_norm": torch.ones(3), "diff": torch.ones(3), "oft_blocks": torch.ones(2, 2)}
    factors, magnitude, rest = module_factors("unet.norm", tensors)
    assert factors is None
    assert magnitude is None
    assert rest == tensors


LOHA = loha(drawn(9), 2, 6, 4)[0]
LOKR = decomposed(drawn(9), "w1", 3, 2)[0] | decomposed(drawn(9), "w2", 2, 2)[0]
BROKEN: dict[str, Tensors] = {
    "half a LoRA": {"lora_up.weight": torch.ones(3, 2)},
    "other half": {"lora_down.weight": torch.ones(3, 2), "alpha": torch.tensor(1.0)},
    "ranks of a LoRA": {"lora_up.weight": torch.ones(3, 2), "lora_down.weight": torch.ones(3, 2)},
    "half a LoHa": {name: tensor for name, tensor in LOHA.items() if name != "hada_w2_b"},
    "ranks of a LoHa": LOHA | {"hada_w2_b": torch.ones(3, 4)},
    "halves of a LoHa": LOHA | {"hada_w2_b": torch.ones(2, 5)},
    "one core": LOHA | {"hada_t1": torch.ones(2, 2, 3, 3)},
    "cores": LOHA | {"hada_t1": torch.ones(3, 3, 3, 3), "hada_t2": torch.ones(2, 2, 3, 3)},
    "half a LoKr": {name: tensor for name, tensor in LOKR.items() if name != "lokr_w2_a"},
    "scalar": LOKR | {"lokr_w2": torch.tensor(1.0)},
    "empty": LOHA | {"hada_w1_a": torch.ones(0, 2)},
    "two kinds": LOHA | LOKR,
    "whole numbers": {"diff": torch.ones(2, 2, dtype=torch.int8)},
    "magnitude": LOHA | {"dora_scale": torch.ones(7)},
    "mid": {name: torch.ones(2, 2, 3, 3) for name in ("lora_up.weight", "lora_mid.weight", "lora_down.weight")},
    "huge core": {
        "lora_up.weight": torch.ones(1, 2),
        "lora_mid.weight": torch.ones(1, 1, 1, 1).expand(2, 1, 3000, 3000),
        "lora_down.weight": torch.ones(1, 3000),
    },
    "huge LoHa": {name: torch.ones(12000, 200) if name.endswith("a") else torch.ones(200, 12000) for name in LOHA},
}


@pytest.mark.parametrize("tensors", BROKEN.values(), ids=BROKEN)
def test_a_broken_module_is_refused_by_name(tensors: Tensors) -> None:
    with pytest.raises(CorruptError) as caught:
        module_factors(LINEAR, tensors)
    assert caught.value.where == LINEAR
