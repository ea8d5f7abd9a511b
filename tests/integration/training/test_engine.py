"""How a run computes: precision, checkpointing, compiling, memory. None of it may change what is learnt."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo.utils
from diffusers import UNet2DConditionModel, get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from train_values import train_params

from lora_pipeline.errors import ParamsError, ResourceError
from lora_pipeline.injection import inject
from lora_pipeline.pretrained import engine
from lora_pipeline.pretrained.blank import seeded
from lora_pipeline.pretrained.engine import checkpointed
from lora_pipeline.pretrained.schedules import rate_factors
from lora_pipeline.training import memory, room
from lora_pipeline.training.averaging import Average
from lora_pipeline.training.memory import Needs, activation_bytes, check_memory
from lora_pipeline.training.tuning import Tuned, tune

pytestmark = pytest.mark.filterwarnings("default::FutureWarning")
LORA: Mapping[str, Any] = {"method": "lora", "tuning.steps": 6, "adapter.text_encoder_targets": ["*q_proj"]}


def silent(step: int, values: dict[str, float]) -> None:
    del step, values


def run(folder: Path, changes: Mapping[str, Any] | None = None) -> Tuned:
    folder.mkdir()
    task = tiny.task(folder, {**LORA, **(changes or {})})
    (folder / "work").mkdir()
    return tune(tiny.components(folder / "tokenizer"), task, folder / "work", silent)


def losses(tuned: Tuned) -> list[float]:
    return [each.loss for each in tuned.losses]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"engine.gradient_checkpointing": True}, 1e-6), ({"engine.precision": "bfloat16"}, 0.05)],
)
def test_the_engine_changes_nothing_beyond_rounding(tmp_path: Path, changes: dict[str, Any], tolerance: float) -> None:
    plain, other = run(tmp_path / "plain"), run(tmp_path / "other", changes)
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)
    assert all(each.up.dtype == torch.float32 for each in other.factors.values())
    for target, factors in plain.factors.items():
        difference = (other.factors[target].delta() - factors.delta()).norm() / factors.delta().norm()
        assert difference < 20 * tolerance


def test_checkpointing_keeps_less_and_gives_the_same_gradients(tmp_path: Path) -> None:
    parts = tiny.components(tmp_path / "tokenizer")
    inject.inject_new(
        parts.unet, "unet", inject.select_targets(parts.unet, "unet", ["*to_q", "*.conv1"]), "a",
        rank=2, alpha=2.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    found: list[tuple[int, list[Tensor]]] = []
    for wanted in (False, True):
        with checkpointed(parts.unet, wanted):
            size = activation_bytes(
                lambda n: parts.unet(torch.zeros(n, 4, 4, 4), torch.zeros(n), torch.zeros(n, 24, tiny.WIDTH)), 4
            )
            generator = torch.Generator().manual_seed(1)
            noisy, words = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 4), (2, 24, tiny.WIDTH)))
            prediction = parts.unet(noisy, torch.tensor([3, 500]), words).sample
            gradients = torch.autograd.grad(prediction.square().sum(), list(inject.trainable(parts.unet).values()))
        found.append((size, list(gradients)))
    assert found[1][0] < 0.7 * found[0][0]
    for plain, again in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(again, plain)


def test_bfloat16_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    parts = tiny.components(tmp_path / "tokenizer")
    before = {name: each.clone() for name, each in parts.unet.state_dict().items()}
    (tmp_path / "work").mkdir()
    tune(parts, tiny.task(tmp_path, {**LORA, "engine.precision": "bfloat16"}), tmp_path / "work", silent)
    after = parts.unet.state_dict()
    assert all(torch.equal(after[name], each) and after[name].dtype == each.dtype for name, each in before.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_float16_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as caught:
        run(tmp_path / "a", {"engine.precision": "float16"})
    assert caught.value.where == "concepts.zorp.train.engine.precision"


@pytest.mark.filterwarnings("default")  # the compiler's, of itself
def test_a_compiled_unet_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BACKEND", "aot_eager")  # all but writing C++, which takes minutes
    changes = {"adapter.unet_targets": ["*attn*.to_?", "*.conv1"], "tuning.steps": 3}
    plain = run(tmp_path / "plain", changes)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert losses(run(tmp_path / "other", {**changes, "engine.compile": True})) == pytest.approx(
        losses(plain), rel=1e-4
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > counted


RATES: list[tuple[dict[str, Any], str, float]] = [
    ({"tuning.learning_rates": {"up_blocks.*": 0}}, "unet.up_blocks", 0.0),
    ({"tuning.learning_rates": {"mid_block.resnets.*": 0.5, "mid*conv1": 0.5}}, "unet.mid_block.resnets", 0.25),
    ({"tuning.text_encoder_learning_rate": 1e-3}, "text_encoder.", 0.1),
    ({"tuning.lora_plus_ratio": 8.0}, "", 8.0),
]


@pytest.mark.parametrize(("changes", "start", "factor"), RATES)
def test_rates_of_layers_multiply_their_steps(
    tmp_path: Path, changes: dict[str, Any], start: str, factor: float
) -> None:
    """Of a first step of plain descent, which is proportional to the rate; only up moves, as it starts at zero."""
    descent = {
        "tuning.steps": 1, "optimiser.name": "torch.optim.SGD", "optimiser.options": {}, "optimiser.weight_decay": 0.0,
        "optimiser.clip_norm": None,
    }  # fmt: skip
    plain, other = run(tmp_path / "plain", descent), run(tmp_path / "other", {**descent, **changes})
    touched = [target for target in plain.factors if target.startswith(start)]
    assert touched
    for target, factors in plain.factors.items():
        torch.testing.assert_close(
            other.factors[target].up, factors.up * (factor if target in touched else 1.0), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"tuning.learning_rates": {"*nothing*": 0.5}}, "tuning.learning_rates"),
        ({"tuning.learning_rates": {"*": 0}}, "tuning.learning_rates"),
        ({"optimiser.schedule_options": {"num_cycles": 2}}, "optimiser.schedule_options"),
        ({"optimiser.name": "adam"}, "optimiser.name"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ParamsError) as caught:
        run(tmp_path / "a", changes)
    assert caught.value.where == f"concepts.zorp.train.{where}"


def test_the_rate_warms_up_and_stays() -> None:
    for warm_up in (0.05, 5.0):
        factor = rate_factors("constant", warm_up, {}, 100)
        assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert {factor(step) for step in range(5, 100)} == {1.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}), ("cosine", {}), ("cosine_with_restarts", {"num_cycles": 3}), ("polynomial", {"power": 2.0}),
    ],
)  # fmt: skip
def test_schedules_are_those_of_diffusers_without_their_idle_ends(name: str, options: dict[str, Any]) -> None:
    steps, warm = 40, 4
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimiser, num_warmup_steps=warm, num_training_steps=steps + 1, **options)
    rates = []
    for _ in range(steps):
        optimiser.step()
        theirs.step()
        rates.append(optimiser.param_groups[0]["lr"])
    factor = rate_factors(name, 0.1, options, steps)
    assert [factor(step) for step in range(steps)] == pytest.approx(rates)
    assert all(rate > 0 for rate in rates)


def test_the_average_is_that_of_diffusers() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ours, theirs = Average({"x": parameter}, 0.9), EMAModel([parameter], decay=0.9)
    for step in range(200):
        with torch.no_grad():
            parameter.add_(torch.randn(3, generator=torch.Generator().manual_seed(step)))
        ours.follow(step + 1)
        theirs.step([parameter])
    torch.testing.assert_close(ours.tensors["x"], theirs.shadow_params[0])


def test_the_estimate_is_what_a_forward_pass_really_keeps() -> None:
    with seeded(0):
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
        ).requires_grad_(requires_grad=False)  # fmt: skip
    targets = inject.select_targets(unet, "unet", ["*to_?"])
    inject.inject_new(unet, "unet", targets, "a", rank=2, alpha=2.0, generator=torch.Generator().manual_seed(0))
    own = {each.untyped_storage().data_ptr() for each in unet.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        unet(torch.randn(6, 4, 16, 16), torch.zeros(6, dtype=torch.long), torch.randn(6, 8, 16))
    real = sum(size for place, size in sizes.items() if place not in own)
    asked = activation_bytes(lambda n: unet(torch.empty(n, 4, 16, 16), torch.zeros(n), torch.empty(n, 8, 16)), 6)
    assert asked == pytest.approx(real, rel=0.05)


def test_a_run_that_cannot_fit_is_refused_with_the_two_values_that_help_most() -> None:
    said: list[str] = []
    params = train_params({"batch_size": 4})
    needs = Needs(base=4_000_000_000, activations=12_000_000_000, learning=30_000_000)
    check_memory(needs, 20_000_000_000, params, said.append)
    assert said == ["memory: base 4.0 GB, activations 12.0 GB, what learns 30.0 MB; 20.0 GB available"]
    with pytest.raises(ResourceError, match=r"12\.0 GB are needed beside the base, and 8\.0 GB are") as caught:
        check_memory(needs, 8_000_000_000, params, said.append)
    told = "engine.gradient_checkpointing: true saves about 8.0 GB, or engine.precision: bfloat16 saves about 8.0 GB"
    assert caught.value.fix == told


def test_a_large_base_is_looked_at_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "is_small", lambda _: False)
    monkeypatch.setattr(room, "available_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match="are available"):
        run(tmp_path / "a")
    assert not list((tmp_path / "a" / "work").iterdir())
    assert memory.available_bytes(torch.device("cpu")) > 1_000_000


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path: Path) -> None:
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from lora_pipeline.errors import ResourceError
from lora_pipeline.training.checkpoints import check_space
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
check_space(Path({str(tmp_path)!r}), 40_000)
try:
    check_space(Path({str(tmp_path)!r}), 60_000)
except ResourceError as error:
    sys.exit(9)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    assert subprocess.run(command, timeout=120, check=False, cwd=Path(__file__).parents[3]).returncode == 9
    assert not list(tmp_path.iterdir())


def test_prodigy_finds_its_rate_on_a_base(tmp_path: Path) -> None:
    changes = {
        "tuning.steps": 60, "optimiser.name": "prodigy", "tuning.learning_rate": 1.0, "prior.weight": 0.0,
        "optimiser.ema": 0.5, "adapter.unet_targets": ["*"], "batch_size": 6,
    }  # fmt: skip
    told = losses(run(tmp_path / "a", changes))
    assert sum(told[-15:]) < 0.97 * sum(told[:15])
    assert all(math.isfinite(each) for each in told)
