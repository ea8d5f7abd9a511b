"""Every method on every kind of base, and the losses of those that read more than latents and one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.errors import ParamsError
from lora_pipeline.pretrained.adapted import add_adapter
from lora_pipeline.pretrained.components import Components
from lora_pipeline.training.batches import Batch, Sampler
from lora_pipeline.training.cache import TensorCache
from lora_pipeline.training.conditioning import live
from lora_pipeline.training.encodings import Encoder
from lora_pipeline.training.holes import SMALLEST, WHOLE, drawn_holes
from lora_pipeline.training.losses import batch_loss
from lora_pipeline.training.objective import objective_of
from lora_pipeline.training.phases import phases_of
from lora_pipeline.training.tuning import Tuned, tune

TEXT = {"adapter.text_encoder_targets": ["*q_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "dreambooth": TEXT, "pti": {"tuning.token_learning_rate": 0.01, "prior.target": "prediction"},
    "joint": {"tuning.token_learning_rate": 0.01, "tuning.token_share": 0.5}, "full": TEXT,
    "lora": {"validation.every": 2, "captions.dropout": 0.3, "pictures.flip": True},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("default::FutureWarning")


def tuned(folder: Path, kind: str, changes: dict[str, Any]) -> tuple[Tuned, Components, dict[str, Tensor]]:
    parts = tiny.components(folder / "tokenizer", kind=kind)
    before = {
        f"{prefix}.{name}": value.clone()
        for prefix, model in parts.models.items()
        for name, value in model.state_dict().items()
    }
    (folder / "work").mkdir()
    learnt = tune(parts, tiny.task(folder, changes), folder / "work", lambda *_: None, cache=folder / "cache")
    return learnt, parts, before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "sd1"])
def test_each_method_learns_on_each_base_and_leaves_it_as_it_was(tmp_path: Path, kind: str, method: str) -> None:
    learnt, parts, before = tuned(tmp_path, kind, {"method": method, **METHODS[method]})
    after = {f"{p}.{name}": value for p, model in parts.models.items() for name, value in model.state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    encoders = len(parts.readers)
    assert [bool(learnt.embeddings), bool(learnt.embeddings_2)] == [method in ("pti", "joint")] * encoders + [False] * (
        2 - encoders
    )
    models = {name.split(".")[0] for name in (*learnt.factors, *learnt.weights)}
    assert models == (set(parts.models) if "adapter.text_encoder_targets" in METHODS[method] else {"unet"})
    still = {target for target, each in learnt.factors.items() if not each.up.any()}
    assert still == {target for target in learnt.factors if unread(target, kind)}
    if method != "full":
        add_adapter(parts.with_own_tokenizers(), learnt.adapter({}), "learnt")


def unread(target: str, kind: str) -> bool:
    """SDXL does not read the last layer of its first text encoder."""
    return kind.startswith("xl") and target.startswith("text_encoder.text_model.encoder.layers.1.")


class Bench:
    """A batch on a base of some kind, and its loss."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.base = tiny.components(folder / "tokenizer", kind=kind)
        task = tiny.task(folder, {"method": "lora", "captions.dropout": 0.4})
        [phase] = phases_of(task.params)
        objective = objective_of(task.params, phase, self.base.scheduler)
        encoder = Encoder(self.base.vae, TensorCache(None), lambda _: None, keep=kind.endswith("inpaint"))
        pools = encoder.examples(task.examples), encoder.examples(task.priors)
        [self.batch] = Sampler(phase, pools, 2, objective, 7).batches(4)
        self.loss = float(batch_loss(self.base, objective, live(self.base), None)(self.batch))

    def cost(self, said: Tensor) -> float:
        batch: Batch = self.batch
        error = said - self.base.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        return float((batch.weights * error.square().flatten(1).mean(1)).sum())

    @property
    def noisy(self) -> Tensor:
        batch: Batch = self.batch
        noisy: Tensor = self.base.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        return noisy


@torch.no_grad()
def test_sdxl_learns_from_both_readings_of_a_caption_its_end_and_the_size(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "xl")
    base, captions = bench.base, bench.batch.captions
    assert "" in captions
    assert base.tokenizer_2 is not None
    assert base.text_encoder_2 is not None
    base.text_encoder_2.text_model.eos_token_id = base.tokenizer_2.eos_token_id
    ids = [torch.tensor(each(captions, padding="max_length").input_ids) for each in (base.tokenizer, base.tokenizer_2)]
    first = base.text_encoder(ids[0], output_hidden_states=True)
    second = base.text_encoder_2(ids[1], output_hidden_states=True)
    told = torch.tensor([bool(caption) for caption in captions])
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1) * told[:, None, None]
    added = {"text_embeds": second.text_embeds * told[:, None], "time_ids": torch.tensor([[8, 8, 0, 0, 8, 8.0]] * 4)}
    said = base.unet(bench.noisy, bench.batch.timesteps, states, added_cond_kwargs=added).sample
    assert bench.loss == pytest.approx(bench.cost(said), rel=1e-5)


@torch.no_grad()
def test_inpainting_learns_from_what_is_left_of_a_picture(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "sd2-inpaint")
    base, batch = bench.base, bench.batch
    assert batch.pictures is not None
    assert batch.holes is not None
    assert 0 < batch.holes.mean() < 1
    rest = torch.where(batch.holes > 0.5, 0.0, batch.pictures)
    latents = base.vae.encode(rest).latent_dist.mean * base.vae.config.scaling_factor
    given = torch.cat([bench.noisy, batch.holes[:, :, ::2, ::2], latents], dim=1)
    ids = torch.tensor(base.tokenizer(batch.captions, padding="max_length").input_ids)
    said = base.unet(given, batch.timesteps, base.text_encoder(ids).last_hidden_state).sample
    assert bench.loss == pytest.approx(bench.cost(said), rel=1e-5)


def test_the_pictures_of_a_batch_are_those_of_its_latents(tmp_path: Path) -> None:
    parts = tiny.components(tmp_path / "tokenizer", kind="sd2-inpaint")
    task = tiny.task(tmp_path)
    for each in Encoder(parts.vae, TensorCache(None), lambda _: None, keep=True).examples(task.examples, flip=True):
        for one in (each, each.mirrored):
            assert one is not None
            assert one.picture is not None
            with torch.no_grad():
                mean = parts.vae.encode(one.picture[None]).latent_dist.mean[0] * parts.vae.config.scaling_factor
            torch.testing.assert_close(one.mean, mean, rtol=1e-4, atol=1e-5)


def test_a_quarter_of_holes_are_whole_and_none_is_small() -> None:
    holes = drawn_holes(4000, (32, 48), torch.Generator().manual_seed(0))
    assert holes.shape == (4000, 1, 32, 48)
    assert set(holes.unique().tolist()) == {0.0, 1.0}
    shares = holes.mean(dim=(1, 2, 3))
    assert float((shares == 1.0).float().mean()) == pytest.approx(WHOLE, abs=0.03)
    assert shares.min() >= 0.7 * SMALLEST**2  # an ellipse has pi / 4 of its box
    places = holes.mean(dim=0)[0]
    assert places.min() == pytest.approx(WHOLE, abs=0.03)  # in the corners hardly any but the whole
    assert places[16, 24] > 0.6
    for side in (0, 1):
        torch.testing.assert_close(places, places.flip(side), rtol=0.0, atol=0.05)
    assert torch.equal(drawn_holes(5, (32, 48), torch.Generator().manual_seed(0)), holes[:5])


def test_a_rate_of_its_own_for_each_text_encoder(tmp_path: Path) -> None:
    rates = {"method": "lora", "tuning.text_encoder_learning_rate": [0.01, 0.0], **TEXT}
    learnt, _, _ = tuned(tmp_path, "xl", rates)
    assert {target.split(".")[0] for target, each in learnt.factors.items() if each.up.any()} == {
        "unet",
        "text_encoder",
    }


def test_rates_of_more_text_encoders_than_there_are_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="has 2 rates, and this base has 1 text encoder"):
        tuned(tmp_path, "sd2", {"method": "lora", "tuning.text_encoder_learning_rate": [0.01, 0.0], **TEXT})


def test_an_adapter_of_sdxl_is_saved_with_both_rows(tmp_path: Path) -> None:
    learnt, _, _ = tuned(tmp_path, "xl", {"method": "ti"})
    adapter: Adapter = learnt.adapter({"kind": "tuned"})
    widths = [rows["<zorp>"].shape for rows in (adapter.embeddings, adapter.embeddings_2)]
    assert widths == [(1, tiny.WIDTH), (1, tiny.WIDTH_2)]
