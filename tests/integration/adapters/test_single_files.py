"""Single files against diffusers' own converters, on models of each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_pipeline.adapters import save_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.checkpoints.single_file import slots_for, slots_of_file
from lora_pipeline.adapters.checkpoints.slots import Place
from lora_pipeline.adapters.fingerprint import base_fingerprint
from lora_pipeline.adapters.header import TensorEntry
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.merging import convert_checkpoint, merge, undo
from lora_pipeline.adapters.storage import read_tensors
from lora_pipeline.adapters.weights import open_weights
from lora_pipeline.errors import PipelineError, UsageError
from stages.convert import convert as convert_command
from stages.merge import merge as merge_command

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
ATTENDED: dict[str, dict[str, Any]] = {
    "sd1": {"down": (1, 1, 1, 0), "layers_per_block": 2},
    "sd2": {"down": (1, 1, 1, 0), "layers_per_block": 2, "use_linear_projection": True},
    "sdxl": {
        "down": (0, 1, 1),
        "layers_per_block": 2,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
    "tiny": {"down": (0, 1), "layers_per_block": 1},
    "one block": {"down": (1,), "layers_per_block": 3},
}


def unet_of(family: str) -> Any:
    from diffusers import UNet2DConditionModel

    settings = dict(ATTENDED[family])
    attended = settings.pop("down")
    return UNet2DConditionModel(
        block_out_channels=tuple(16 * 2**index for index in range(len(attended))),
        down_block_types=tuple(CROSS[0] if each else "DownBlock2D" for each in attended),
        up_block_types=tuple(CROSS[1] if each else "UpBlock2D" for each in reversed(attended)),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=8,
        **settings,
    )


def clip_of(layers: int, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=24 if projected else 16,
        bos_token_id=38,
        eos_token_id=39,
        pad_token_id=39,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[str], Path]:
    from diffusers import AutoencoderKL

    def make(family: str) -> Path:
        folder = tmp_path / family
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            models = {
                "unet": unet_of(family),
                "vae": AutoencoderKL(
                    block_out_channels=(8, 16),
                    down_block_types=("DownEncoderBlock2D",) * 2,
                    up_block_types=("UpDecoderBlock2D",) * 2,
                    layers_per_block=2,
                    norm_num_groups=4,
                ),
                "text_encoder": clip_of(3),
            }
            if family == "sdxl":
                models["text_encoder_2"] = clip_of(4, projected=True)
            for name, model in models.items():
                for parameter in model.parameters():  # no two tensors alike
                    torch.nn.init.normal_(parameter, std=0.05)
                model.half().save_pretrained(folder / name)
        return folder

    return make


def without_level(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def as_diffusers_reads(file: dict[str, Tensor], family: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Each component of a single file, converted by diffusers."""
    import json

    from diffusers.loaders import single_file_utils as theirs

    unet, vae = (json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae"))
    wide = SimpleNamespace(config=SimpleNamespace(hidden_size=16))
    read = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(file), unet),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(file), vae),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(file)),
    }
    if family == "sd2":
        read["text_encoder"] = theirs.convert_open_clip_checkpoint(wide, dict(file))
    if family == "sdxl":
        # which takes the width of the attention from the projection's: its first side is the model's width
        prefix = "conditioner.embedders.1.model."
        read["text_encoder_2"] = theirs.convert_open_clip_checkpoint(wide, dict(file), prefix=prefix)
    return read


@pytest.mark.parametrize("family", ATTENDED)
def test_diffusers_reads_our_single_file_as_the_folder_it_came_from(
    tmp_path: Path, make_folder: Callable[[str], Path], family: str
) -> None:
    folder = make_folder(family)
    convert_checkpoint(folder, tmp_path / "out.safetensors")
    file = read_tensors(tmp_path / "out.safetensors")[0]
    for name, tensors in as_diffusers_reads(file, family, folder).items():
        expected = without_level(read_tensors(folder / WEIGHTS[name])[0])
        found = without_level({key: tensor for key, tensor in tensors.items() if tensor is not None})
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("family", ATTENDED)
def test_a_folder_comes_back_byte_for_byte_from_its_single_file(
    tmp_path: Path, make_folder: Callable[[str], Path], family: str
) -> None:
    folder, single, back = make_folder(family), tmp_path / "out.safetensors", tmp_path / "back"
    convert_checkpoint(folder, single)
    convert_checkpoint(single, back, like=folder)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(back) for path in back.rglob("*") if path.is_file()}
    for path in files:
        if path.suffix != ".safetensors":
            assert (back / path).read_bytes() == (folder / path).read_bytes()
            continue
        (ours, our_metadata), (theirs, metadata) = read_tensors(back / path), read_tensors(folder / path)
        assert our_metadata == metadata
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_torch_loads_our_ckpt_without_running_code(
    tmp_path: Path, make_folder: Callable[[str], Path], family: str, mmap: bool
) -> None:
    folder = make_folder(family)
    convert_checkpoint(folder, tmp_path / "out.safetensors")
    convert_checkpoint(tmp_path / "out.safetensors", tmp_path / "out.ckpt")
    theirs = torch.load(tmp_path / "out.ckpt", weights_only=True, mmap=mmap)["state_dict"]
    ours = read_tensors(tmp_path / "out.safetensors")[0]
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name
    convert_checkpoint(folder, tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").read_bytes() == (tmp_path / "out.ckpt").read_bytes()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_merge_is_the_same_by_either_way(tmp_path: Path, make_folder: Callable[[str], Path], family: str) -> None:
    folder = make_folder(family)
    source = torch.Generator().manual_seed(1)
    weights = open_weights(folder)
    factors = {}
    for name in sorted(weights.places)[::3]:
        shape = weights.shape(name)
        if name.endswith(".weight") and len(shape) in (2, 4) and "embedding" not in name:
            tail = [1] * (len(shape) - 2)
            down = torch.randn(2, *shape[1:], generator=source)
            factors[name.removesuffix(".weight")] = LoraFactors(
                down, torch.randn(shape[0], 2, *tail, generator=source), 0.5
            )
    assert any(target.endswith("q_proj") for target in factors)
    parts = [("a", Adapter(factors), 0.7)]
    merge(folder, parts, tmp_path / "merged", None)
    merge(folder, parts, tmp_path / "merged.safetensors", None)
    convert_checkpoint(folder, tmp_path / "plain.safetensors")
    merge(tmp_path / "plain.safetensors", parts, tmp_path / "other", None, like=folder)
    direct, later = open_weights(tmp_path / "merged"), open_weights(tmp_path / "merged.safetensors")
    other = open_weights(tmp_path / "other")
    assert direct.places.keys() == later.places.keys() == other.places.keys()
    for name in direct.places:
        assert torch.equal(direct.read(name), later.read(name)), name
        assert torch.equal(direct.read(name), other.read(name)), name
        target = name.removesuffix(".weight")
        if target not in factors or name == target:
            assert torch.equal(direct.read(name), weights.read(name)), name
        else:
            expected = weights.read(name).double() + 0.7 * factors[target].delta().double()
            torch.testing.assert_close(direct.read(name).double(), expected, rtol=1e-3, atol=1e-5)


STANDARD: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
COUNTS = {"sd1": 686, "sd2": 686, "sdxl": 1680}


@pytest.mark.parametrize("family", STANDARD)
def test_every_name_of_the_published_unets_is_diffusers_name(family: str) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as theirs

    with torch.device("meta"):
        unet = UNet2DConditionModel(**STANDARD[family])
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    places = {
        f"{model}.{name}": Place(Path("x"), TensorEntry("F16", tuple(tensor.shape), 0, 0))
        for model, module in (("unet", unet), ("vae", vae))
        for name, tensor in module.state_dict().items()
    }
    slots = slots_for(places)
    shapes = {key: torch.empty(slot.shape, device="meta") for key, slot in slots.items()}
    for model, module, convert in (
        ("unet", unet, theirs.convert_ldm_unet_checkpoint),
        ("vae", vae, theirs.convert_ldm_vae_checkpoint),
    ):
        found = {name: tensor.shape for name, tensor in convert(dict(shapes), module.config).items()}
        assert found == {name: tensor.shape for name, tensor in module.state_dict().items()}
        assert model == "vae" or len(found) == COUNTS[family]
    entries = {key: TensorEntry("F16", slot.shape, 0, 0) for key, slot in slots.items()}
    assert slots_of_file(entries) == slots


def same_tensors(one: Path, other: Path) -> bool:
    left, right = open_weights(one), open_weights(other)
    return left.places.keys() == right.places.keys() and all(
        torch.equal(left.read(name), right.read(name)) for name in left.places
    )


def test_a_model_goes_through_every_form_by_command(
    tmp_path: Path, make_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("sd1")
    (folder / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PIPE_TRACKING", "off")
    single, old, back = Path("x.safetensors"), Path("x.ckpt"), Path("back")
    convert_command(folder, single, to="single")
    convert_command(single, old, to="ckpt")
    convert_command(old, back, to="folder", like=folder)
    convert_command(old, back, to="folder", like=folder)  # a model may be replaced
    assert same_tensors(folder, back)
    assert base_fingerprint(old) == base_fingerprint(single)
    convert_command(folder, single, to="single", dtype="float32")
    assert {each.dtype for name, each in read_tensors(single)[0].items() if "diffusion" in name} == {torch.float32}


def test_a_ckpt_that_torch_wrote_is_merged_into_and_undone(tmp_path: Path, make_folder: Callable[[str], Path]) -> None:
    folder, base = make_folder("sd2"), tmp_path / "base.safetensors"
    convert_checkpoint(folder, base)
    torch.save({"state_dict": read_tensors(base)[0], "epoch": 1}, tmp_path / "base.ckpt")
    shape = open_weights(base).shape("unet.conv_in.weight")
    factors = LoraFactors(torch.ones(2, *shape[1:]), torch.ones(shape[0], 2, 1, 1), 0.5)
    parts = [("a", Adapter({"unet.conv_in": factors}), 0.7)]
    merge(base, parts, tmp_path / "one.safetensors", None)
    merge(tmp_path / "base.ckpt", parts, tmp_path / "two.ckpt", None)
    assert same_tensors(tmp_path / "one.safetensors", tmp_path / "two.ckpt")
    undo(tmp_path / "two.ckpt", tmp_path / "base.ckpt", tmp_path / "back.safetensors")
    assert read_tensors(tmp_path / "back.safetensors")[0].keys() == read_tensors(base)[0].keys()
    assert same_tensors(tmp_path / "back.safetensors", base)


@pytest.mark.parametrize(
    ("source", "out", "options"),
    [
        ("x.safetensors", "y.ckpt", {"to": "single"}),
        ("x.safetensors", "y.safetensors", {"to": "ckpt"}),
        ("x.safetensors", "y.safetensors", {"to": "folder"}),
        ("x.safetensors", "pictures", {"to": "folder", "like": Path("sd1")}),
        ("x.safetensors", "y", {"to": "folder"}),
        ("x.safetensors", "y.safetensors", {"to": "single", "rank": 4}),
        ("x.safetensors", "x.safetensors", {"to": "single"}),
        ("adapter.safetensors", "y.safetensors", {"to": "single"}),
        ("adapter.safetensors", "y.safetensors", {"to": "kohya", "like": Path("sd1")}),
        ("x.safetensors", "y.safetensors", {"to": "kohya"}),
        ("x.safetensors", "y.safetensors", {"to": "single", "dtype": "int8"}),
    ],
)
def test_conversions_that_cannot_be_are_refused(
    tmp_path: Path,
    make_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    out: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PIPE_TRACKING", "off")
    convert_checkpoint(make_folder("sd1"), Path("x.safetensors"))
    save_adapter(
        Adapter({"unet.conv_in": LoraFactors(torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1), 1.0)}),
        Path("adapter.safetensors"),
    )
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in Path().glob("*.safetensors")}
    with pytest.raises(PipelineError):
        convert_command(Path(source), Path(out), **options)
    assert {path: path.read_bytes() for path in Path().glob("*.safetensors")} == before
    assert Path("pictures/a.png").read_bytes() == b"mine"


@pytest.mark.parametrize("out", ["notes", "sd1"])
def test_a_merge_replaces_neither_its_base_nor_a_file_by_a_folder(
    tmp_path: Path, make_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_folder("sd1")
    (base / "model_index.json").write_text("{}")
    Path("notes").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"is the base|is a file"):
        merge_command(base, Path(out), files=["a.safetensors"])
    assert Path("notes").read_bytes() == b"mine"
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


def test_a_merge_never_replaces_a_folder_that_is_no_model(
    tmp_path: Path, make_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match="something else"):
        merge_command(make_folder("sd1"), Path("pictures"), files=["a.safetensors"])
    assert Path("pictures/a.png").read_bytes() == b"mine"
