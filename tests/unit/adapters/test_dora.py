"""A DoRA made plain, against its formula and the singular values of the full change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.checkpoints.slots import Place
from lora_pipeline.adapters.dora import approximated, dora_change, plain
from lora_pipeline.adapters.header import read_header
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.ranks import RankRule
from lora_pipeline.adapters.storage import write_tensors
from lora_pipeline.adapters.weights import Weights
from lora_pipeline.errors import CorruptError

TARGET = "unet.mid_block.resnets.0.conv1"


def weights(folder: Path, weight: Tensor) -> Weights:
    path = folder / "base"
    write_tensors(path, {f"{TARGET}.weight": weight}, {})
    return Weights({name: Place(path, entry) for name, entry in read_header(path).tensors.items()})


def test_norms_by_column_are_the_magnitude_afterwards(generator: torch.Generator) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    factors = LoraFactors(torch.randn(2, 4, 3, 3, generator=generator), torch.randn(6, 2, 1, 1), 2.0)
    magnitude = torch.rand(1, 4, 1, 1, generator=generator)
    changed = weight.double() + dora_change("x", weight, factors, magnitude)
    torch.testing.assert_close(changed.transpose(0, 1).flatten(1).norm(dim=1), magnitude.double().flatten())


def test_a_row_of_zeros_stays_zero() -> None:
    factors = LoraFactors(torch.ones(1, 3), torch.tensor([[1.0], [0.0]]), 1.0)
    change = dora_change("x", torch.zeros(2, 3), factors, torch.ones(2, 1))
    torch.testing.assert_close(change[0], torch.full((3,), 3**-0.5, dtype=torch.float64))
    assert not change[1].any()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 8, 3, 3), (40, 2, 3, 3)])
@pytest.mark.parametrize("rule", [RankRule("rank", 3), RankRule("error", 0.5)])
def test_the_cut_is_the_best_of_its_rank(generator: torch.Generator, shape: tuple[int, ...], rule: RankRule) -> None:
    change = torch.randn(shape, generator=generator).double()
    factors, cut = approximated(change, rule)
    values = torch.linalg.svdvals(change.flatten(1))
    best = float(values[rule.choose(values) :].norm() / values.norm())
    assert 0 < factors.rank == rule.choose(values) < len(values)
    assert cut.residual == pytest.approx(best, rel=1e-5)
    assert cut.norm == pytest.approx(float(values.norm()))
    assert float((factors.delta() - change).norm() / change.norm()) == pytest.approx(best, rel=1e-5)


def test_all_of_a_change_is_kept_on_request(generator: torch.Generator) -> None:
    change = torch.randn(7, 4, 3, 3, generator=generator)
    factors, cut = approximated(change, None)
    assert torch.equal(factors.delta(), change)
    assert (cut.rank, cut.residual) == (7, 0.0)
    assert cut.norm == pytest.approx(float(change.norm()))


def test_no_change_has_factors_of_zeros() -> None:
    factors, cut = approximated(torch.zeros(3, 4, dtype=torch.float64), RankRule("energy", 0.9))
    assert not factors.delta().any()
    assert cut.residual == 0.0


def test_layers_without_a_magnitude_stay_as_they_are(tmp_path: Path) -> None:
    adapter = Adapter({TARGET: LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 1.0)}, {"<a>": torch.ones(1, 2)})
    made, cuts = plain(adapter, weights(tmp_path, torch.ones(3, 2)), None)
    assert made.factors[TARGET] is adapter.factors[TARGET]
    assert made.embeddings == adapter.embeddings
    assert cuts == {}


@pytest.mark.parametrize(
    ("shape", "magnitude", "said"),
    [((3, 2), (4,), "fits neither"), ((3, 2), (2, 1), "fits neither"), ((3, 4), (3, 1), "shape")],
)
def test_another_base_is_refused(tmp_path: Path, shape: tuple[int, ...], magnitude: tuple[int, ...], said: str) -> None:
    factors = LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    adapter = Adapter({TARGET: factors}, magnitudes={TARGET: torch.ones(magnitude)})
    with pytest.raises(CorruptError, match=said) as caught:
        plain(adapter, weights(tmp_path, torch.ones(shape)), None)
    assert caught.value.where == TARGET
    with pytest.raises(CorruptError, match="no layer"):
        plain(adapter, Weights({}), None)
