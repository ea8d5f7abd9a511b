"""diffusers and PEFT as clients of what we write, and we of what they write, on SD 1.5's and SDXL's topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.composition import compose
from lora_pipeline.adapters.formats import diffusers, load, save
from lora_pipeline.injection.inject import collapse, inject_adapter, set_weights

Load = Callable[..., Any]
Make = Callable[..., Adapter]
MODELS = ("unet", "text_encoder", "text_encoder_2")
FILE = "pytorch_lora_weights.safetensors"

# PEFT asks transformers for an attribute of an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def models_of(pipeline: Any) -> dict[str, Any]:
    return {name: model for name in MODELS if (model := getattr(pipeline, name, None)) is not None}


def predictions(models: Mapping[str, Any]) -> dict[str, Tensor]:
    """What each model says, each asked by itself."""
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 70, (1, 24), generator=source)
    latents, width = torch.randn(1, 4, 8, 8, generator=source), 32 if "text_encoder_2" in models else 16
    context = torch.randn(1, 24, width, generator=source)
    extra = {"text_embeds": torch.randn(1, 12, generator=source), "time_ids": torch.arange(6.0)[None]}
    with torch.no_grad():
        said = {"unet": models["unet"](latents, 500, context, added_cond_kwargs=extra).sample}
        for name in (name for name in models if name != "unet"):
            output = models[name](ids, output_hidden_states=True)
            said[name] = output.hidden_states[-2]
            said[f"{name} pooled"] = output.text_embeds if "text_embeds" in output else output.pooler_output
    return said


def ours(pipeline: Any, adapter: Adapter, weight: float = 1.0) -> dict[str, Tensor]:
    models = models_of(pipeline)
    for name, model in models.items():
        inject_adapter(model, name, adapter, "a")
        set_weights(model, {"a": weight})
    return predictions(models)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def assert_changes_everything(said: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> None:
    for name, each in said.items():
        assert not torch.allclose(each, plain[name], rtol=1e-2), name


@pytest.fixture(params=["sd1", "sdxl"])
def family(request: pytest.FixtureRequest) -> tuple[Load, Adapter]:
    """A pipeline's loader, and an adapter of mixed ranks and alphas for all its models."""
    if request.param == "sd1":
        return request.getfixturevalue("pipeline"), request.getfixturevalue("make_adapter")(1)
    return request.getfixturevalue("sdxl"), request.getfixturevalue("make_sdxl_adapter")(1)


@pytest.mark.parametrize("weight", [1.0, 0.4, -0.7])
def test_diffusers_loads_our_file_and_says_the_same(
    tmp_path: Path, family: tuple[Load, Adapter], weight: float
) -> None:
    pipeline, adapter = family
    save(adapter, tmp_path / FILE, "diffusers")
    theirs = pipeline()
    theirs.load_lora_weights(tmp_path, adapter_name="a")
    theirs.set_adapters(["a"], [weight])
    said = predictions(models_of(theirs))
    assert_same(said, ours(pipeline(), adapter, weight))
    assert_changes_everything(said, predictions(models_of(pipeline())))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_blend_in_one_file_is_what_diffusers_makes_of_its_parts(
    tmp_path: Path, pipeline: Load, make_adapter: Make
) -> None:
    parts = [("a", make_adapter(1), 0.7), ("b", make_adapter(2), -0.4)]
    one, two = pipeline(), pipeline()
    for name, adapter, _ in parts:
        save(adapter, tmp_path / name / FILE, "diffusers")
        two.load_lora_weights(tmp_path / name, adapter_name=name)
    two.set_adapters(["a", "b"], [0.7, -0.4])
    save(compose(parts), tmp_path / FILE, "diffusers")
    one.load_lora_weights(tmp_path)
    assert_same(predictions(models_of(one)), predictions(models_of(two)))


def by_from_pretrained(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def by_injection(model: Any, folder: Path) -> Any:
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), model)
    result: Any = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    return model


def by_transformers(model: Any, folder: Path) -> Any:
    if not hasattr(model, "load_adapter"):  # a UNet of diffusers
        return by_from_pretrained(model, folder)
    model.load_adapter(folder)
    return model


@pytest.mark.parametrize("attach", [by_from_pretrained, by_injection, by_transformers])
def test_peft_loads_our_folder_and_says_the_same(
    tmp_path: Path, family: tuple[Load, Adapter], attach: Callable[[Any, Path], Any]
) -> None:
    pipeline, adapter = family
    save(adapter, tmp_path / "x", "peft")
    loaded = {name: attach(model, tmp_path / "x" / name) for name, model in models_of(pipeline()).items()}
    assert_same(predictions(loaded), ours(pipeline(), adapter))


def with_magnitudes(adapter: Adapter) -> Adapter:
    source = torch.Generator().manual_seed(2)
    return replace(
        adapter,
        magnitudes={
            target: 0.5 + torch.rand(factors.up.shape[0], *[1] * (factors.up.ndim - 1), generator=source)
            for target, factors in adapter.factors.items()
        },
    )


def by_formula(pipeline: Any, adapter: Adapter) -> dict[str, Tensor]:
    """W' = m (W + delta) / ||W + delta||, with norms over everything but the outputs."""
    plain = replace(adapter, magnitudes={})
    models = models_of(pipeline)
    for name, model in models.items():
        inject_adapter(model, name, plain, "a")
        paths = {layer.target: path for path, layer in model.named_modules() if hasattr(layer, "branches")}
        collapse(model)
        for target, path in paths.items():
            weight = model.get_submodule(path).weight
            norms = weight.detach().flatten(1).norm(dim=1).reshape(adapter.magnitudes[target].shape)
            weight.data *= adapter.magnitudes[target] / norms
    return predictions(models)


def test_diffusers_loads_our_dora(tmp_path: Path, family: tuple[Load, Adapter]) -> None:
    pipeline, adapter = family
    adapter = with_magnitudes(adapter)
    save(adapter, tmp_path / FILE, "diffusers")
    theirs = pipeline()
    theirs.load_lora_weights(tmp_path)
    assert_same(predictions(models_of(theirs)), by_formula(pipeline(), adapter))


@pytest.mark.parametrize("attach", [by_from_pretrained, by_injection, by_transformers])
def test_peft_loads_our_dora(tmp_path: Path, family: tuple[Load, Adapter], attach: Callable[[Any, Path], Any]) -> None:
    pipeline, adapter = family
    adapter = with_magnitudes(adapter)
    save(adapter, tmp_path / "x", "peft")
    loaded = {name: attach(model, tmp_path / "x" / name) for name, model in models_of(pipeline()).items()}
    assert_same(predictions(loaded), by_formula(pipeline(), adapter))


def randomised(model: Any, seed: int = 3) -> Any:
    source = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 + 0.3 * torch.rand(parameter.shape, generator=source)
    return model.eval()


UNET_WORDS = ["to_q", "conv1", "proj_in", "ff.net.0.proj"]


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves(tmp_path: Path, family: tuple[Load, Adapter], rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    pipeline, _ = family
    patterns: dict[str, Any] = {
        "unet": {"rank_pattern": {"conv1": 2, "attn1.to_q": 5}, "alpha_pattern": {r"attn2\.to_q|proj_in": 7}},
        "text_encoder": {"rank_pattern": {"encoder.layers.0.mlp.fc1": 1}, "alpha_pattern": {"fc1": 3}},
    }
    patterns["text_encoder_2"] = patterns["text_encoder"]
    models = {}
    for name, model in models_of(pipeline()).items():
        words = UNET_WORDS if name == "unet" else ["q_proj", "fc1"]
        config = LoraConfig(r=3, lora_alpha=5, target_modules=words, use_rslora=rslora, **patterns[name])
        models[name] = randomised(get_peft_model(model, config))
        models[name].save_pretrained(tmp_path / name)
    adapter = load(tmp_path)
    assert {factors.rank for factors in adapter.factors.values()} == {1, 2, 3, 5}
    assert_same(ours(pipeline(), adapter), predictions(models))


def test_a_folder_of_one_model_says_by_its_keys_which(tmp_path: Path, pipeline: Load) -> None:
    from peft import LoraConfig, get_peft_model

    for name, words in (("unet", ["to_q"]), ("text_encoder", ["q_proj"])):
        model = randomised(get_peft_model(getattr(pipeline(), name), LoraConfig(target_modules=words)))
        model.save_pretrained(tmp_path / "x" / name / "adapter")
        adapter = load(tmp_path / "x" / name / "adapter")
        assert {target.partition(".")[0] for target in adapter.factors} == {name}
        save(adapter, tmp_path / "y" / name, "peft")
        assert load(tmp_path / "y" / name).factors.keys() == adapter.factors.keys()


def test_we_load_the_dora_that_peft_saves(tmp_path: Path, pipeline: Load) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=UNET_WORDS, use_dora=True)
    model = randomised(get_peft_model(pipeline().unet, config))
    model.save_pretrained(tmp_path)
    adapter = load(tmp_path)
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    assert {f"unet.{name}" for name in layers} == set(adapter.factors) == set(adapter.magnitudes)
    for name, layer in layers.items():
        factors = adapter.factors[f"unet.{name}"]
        assert torch.equal(factors.down, layer.lora_A["default"].weight)
        assert torch.equal(factors.up, layer.lora_B["default"].weight)
        assert factors.scale == layer.scaling["default"]
        norms = layer.lora_magnitude_vector["default"].weight
        assert torch.equal(adapter.magnitudes[f"unet.{name}"].flatten(), norms.flatten())
    assert_same(by_formula(pipeline(), adapter), predictions({**models_of(pipeline()), "unet": model}))


def test_we_load_what_a_unet_of_diffusers_saves_by_itself(tmp_path: Path, pipeline: Load) -> None:
    from peft import LoraConfig

    theirs = pipeline()
    theirs.unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=UNET_WORDS, alpha_pattern={"conv1": 2}))
    randomised(theirs.unet).save_lora_adapter(tmp_path)
    assert_same(ours(pipeline(), load(tmp_path / FILE)), predictions(models_of(theirs)))


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
FEED_FORWARD = "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
FC1 = "encoder.layers.0.mlp.fc1"
LAYER = "text_model.encoder.layers.1.self_attn"
# A layer, its sizes, and the key of its `down` in each era, as it stands in the files.
ERAS = {
    "attention processors": [
        (f"unet.{ATTENTION}.to_q", 32, 32, f"unet.{ATTENTION}.processor.to_q_lora.down.weight"),
        (f"unet.{ATTENTION}.to_v", 16, 32, f"unet.{ATTENTION}.processor.to_v_lora.down.weight"),
        (f"unet.{ATTENTION}.to_out.0", 32, 32, f"unet.{ATTENTION}.processor.to_out_lora.down.weight"),
        (f"text_encoder.{LAYER}.q_proj", 16, 16, f"text_encoder.{LAYER}.to_q_lora.down.weight"),
        (f"text_encoder.{LAYER}.out_proj", 16, 16, f"text_encoder.{LAYER}.to_out_lora.down.weight"),
    ],
    "layers": [
        (f"unet.{ATTENTION}.to_q", 32, 32, f"unet.{ATTENTION}.to_q.lora.down.weight"),
        (f"unet.{ATTENTION}.to_out.0", 32, 32, f"unet.{ATTENTION}.to_out.0.lora.down.weight"),
        (f"text_encoder.{LAYER}.v_proj", 16, 16, f"text_encoder.{LAYER}.v_proj.lora_linear_layer.down.weight"),
        (f"text_encoder.{LAYER}.out_proj", 16, 16, f"text_encoder.{LAYER}.out_proj.lora_linear_layer.down.weight"),
    ],
    "peft": [
        (f"unet.{ATTENTION}.to_q", 32, 32, f"unet.{ATTENTION}.to_q.lora_A.weight"),
        (f"text_encoder.{LAYER}.q_proj", 16, 16, f"text_encoder.{LAYER}.q_proj.lora_A.weight"),
    ],
    "mixed": [
        (f"unet.{ATTENTION}.to_q", 32, 32, f"unet.{ATTENTION}.to_q.lora.down.weight"),
        (f"unet.{FEED_FORWARD}", 128, 32, f"unet.{FEED_FORWARD}.lora_A.weight"),
        (f"text_encoder.{LAYER}.q_proj", 16, 16, f"text_encoder.{LAYER}.q_proj.lora_linear_layer.down.weight"),
        (f"text_encoder.text_model.{FC1}", 16, 32, f"text_encoder.{FC1}.lora_A.weight"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("era", ERAS)
def test_files_of_every_era_mean_to_us_what_they_mean_to_diffusers(tmp_path: Path, pipeline: Load, era: str) -> None:
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    source = torch.Generator().manual_seed(4)
    tensors, wanted = {}, {}
    for target, inputs, outputs, key in ERAS[era]:
        down = 0.3 * torch.randn(2, inputs, generator=source)
        up = 0.3 * torch.randn(outputs, 2, generator=source)
        tensors[key], tensors[key.replace(".down.", ".up.").replace("lora_A", "lora_B")] = down, up
        wanted[target] = up, down
    save_file(tensors, tmp_path / FILE)
    adapter = load(tmp_path / FILE)
    assert adapter.factors.keys() == wanted.keys()
    for target, (up, down) in wanted.items():
        assert torch.equal(adapter.factors[target].up, up)
        assert torch.equal(adapter.factors[target].down, down)
        assert adapter.factors[target].scale == 1.0
    theirs = pipeline()
    theirs.load_lora_weights(tmp_path)
    assert_same(ours(pipeline(), adapter), predictions(models_of(theirs)))
    newest = {name for name in diffusers.render(adapter)[0] if name.startswith("unet.")}
    assert newest == set(convert_unet_state_dict_to_peft({key: 0 for key in tensors if key.startswith("unet.")}))


def test_diffusers_loads_the_token_of_our_folder(tmp_path: Path, pipeline: Load, make_adapter: Make) -> None:
    adapter = make_adapter(1, {"<zorp>": 2})
    save(adapter, tmp_path / "x", "peft")
    theirs = pipeline()
    theirs.load_textual_inversion(tmp_path / "x" / "learned_embeds.safetensors")
    ids = theirs.tokenizer("<zorp> <zorp>_1", add_special_tokens=False).input_ids
    rows = theirs.text_encoder.get_input_embeddings()(torch.tensor(ids))
    torch.testing.assert_close(rows, adapter.embeddings["<zorp>"])
