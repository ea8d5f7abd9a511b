"""cloneofsimo's positional format, against an independent account of its reader and of a published file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import cloneofsimo, save
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.positions import LEGACY, MODERN, UNET_CLASSES, text_targets, unet_targets
from lora_pipeline.adapters.storage import read_tensors
from lora_pipeline.adapters.topology import SD1, SD2, layers
from lora_pipeline.errors import CorruptError

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UP = "unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj"
SHORTCUT = "unet.up_blocks.0.resnets.2.conv_shortcut"
CONV = "unet.down_blocks.0.resnets.0.conv1"
EVERYWHERE = unet_targets(UNET_CLASSES[1], MODERN) + text_targets(12)
CLIP = "text_encoder.text_model.encoder.layers.3.self_attn.v_proj"


def factors(target: str, rank: int, alpha: float, family: str = SD1, seed: int = 0) -> LoraFactors:
    shape = layers(family)[target]
    source = torch.Generator().manual_seed(seed + len(target))
    down = torch.randn(rank, *shape[1:], generator=source)
    return LoraFactors(down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=source), alpha)


def read_as_the_original_does(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, list[Tensor]]:
    """Its `parse_safeloras` and `parse_safeloras_embeds`, from their description: positions in order, none left out."""
    sizes = Counter(name.partition(":")[0] for name in tensors)
    found: dict[str, list[Tensor]] = {}
    for name in sorted(tensors):
        if metadata.get(name) == "<embed>":
            continue
        model, index, side = name.split(":")
        ranks = found.setdefault(model, [torch.empty(0)] * sizes[model])
        assert int(metadata[f"{model}:{index}:rank"]) == tensors[name].shape[1 if side == "up" else 0]
        ranks[2 * int(index) + (side == "down")] = tensors[name]
    assert all(isinstance(json.loads(metadata[model]), list) for model in found)
    assert all(each.numel() for tensors in found.values() for each in tensors)
    return found


def test_the_orders_are_those_of_published_files() -> None:
    legacy, modern = (unet_targets(UNET_CLASSES[0], order) for order in (LEGACY, MODERN))
    assert (len(legacy), len(modern)) == (144, 144)
    assert set(legacy) == set(modern)
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0."
    assert legacy[3:6] == tuple(block + each for each in ("attn1.to_out.0", "ff.net.0.proj", "attn2.to_q"))
    assert modern[3:6] == tuple(block + each for each in ("attn1.to_out.0", "attn2.to_q", "attn2.to_k"))
    assert modern[8] == block + "ff.net.0.proj"
    assert legacy[9 * 15].startswith("unet.mid_block.attentions.0.")
    assert legacy[9 * 6].startswith("unet.up_blocks.1.attentions.0.")
    assert text_targets(12)[5] == "text_encoder.text_model.encoder.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("order", [LEGACY, MODERN])
def test_the_extended_file_has_its_sections_where_they_were_found(order: str) -> None:
    targets = unet_targets(UNET_CLASSES[1], order)
    assert len(targets) == 224
    attentions = {
        "down_blocks.0": [0, 9],
        "down_blocks.1": [24, 33],
        "down_blocks.2": [49, 58],
        "up_blocks.1": [92, 101, 110],
        "up_blocks.2": [131, 140, 149],
        "up_blocks.3": [170, 179, 188],
        "mid_block": [209],
    }
    resnets = {
        "down_blocks.0": [18, 21],
        "down_blocks.1": [42, 46],
        "down_blocks.2": [67, 71],
        "down_blocks.3": [74, 77],
        "up_blocks.0": [80, 84, 88],
        "up_blocks.1": [119, 123, 127],
        "up_blocks.2": [158, 162, 166],
        "up_blocks.3": [197, 201, 205],
        "mid_block": [218, 221],
    }
    for block, starts in attentions.items():
        for index, start in enumerate(starts):
            assert targets[start] == f"unet.{block}.attentions.{index}.transformer_blocks.0.attn1.to_q"
    for block, starts in resnets.items():
        for index, start in enumerate(starts):
            assert targets[start : start + 3] == tuple(
                f"unet.{block}.resnets.{index}.{name}" for name in ("conv1", "time_emb_proj", "conv2")
            )


@pytest.mark.parametrize("family", [SD1, SD2])
@pytest.mark.parametrize("classes", UNET_CLASSES, ids="+".join)
def test_every_layer_of_the_orders_is_a_layer_of_the_family(family: str, classes: tuple[str, ...]) -> None:
    assert set(unet_targets(classes, MODERN)) <= set(layers(family))


@pytest.mark.parametrize("order", [LEGACY, MODERN])
@pytest.mark.parametrize("family", [SD1, SD2])
def test_what_goes_in_comes_out_in_its_order(tmp_path: Path, order: str, family: str) -> None:
    targets = [ATTENTION, UP, CONV, SHORTCUT, CLIP]
    parts = {target: factors(target, 1 + index % 3, 1.0 + index % 3, family) for index, target in enumerate(targets)}
    provenance = {"order": LEGACY} if order == LEGACY else {}
    adapter = Adapter(parts, {"<s1>": torch.ones(1, 768), "<s2>": torch.zeros(2, 768)}, provenance)
    save(adapter, tmp_path / "x", "cloneofsimo")
    back = load_adapter(tmp_path / "x")
    assert back.provenance == adapter.provenance
    assert back.factors.keys() == parts.keys()
    for target, each in parts.items():
        assert torch.equal(back.factors[target].down, each.down)
        assert torch.equal(back.factors[target].up, each.up)
        assert back.factors[target].alpha == each.alpha
    assert {token: rows.tolist() for token, rows in back.embeddings.items()} == {
        token: rows.tolist() for token, rows in adapter.embeddings.items()
    }
    save(back, tmp_path / "y", "cloneofsimo")
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


@given(
    st.sets(st.sampled_from(unet_targets(UNET_CLASSES[1], MODERN) + text_targets(12)), min_size=1, max_size=6),
    st.floats(0.1, 9),
)
@settings(max_examples=8, deadline=None)
def test_the_original_reader_finds_every_change(targets: set[str], alpha: float) -> None:
    adapter = Adapter({target: factors(target, 2, alpha) for target in targets})
    tensors, metadata = cloneofsimo.render(adapter)
    found = read_as_the_original_does(tensors, metadata)
    unet = {len(unet_targets(classes, MODERN)): classes for classes in UNET_CLASSES}
    for model, pairs in found.items():
        places = unet_targets(unet[len(pairs) // 2], MODERN) if model == "unet" else text_targets(12)
        for index, target in enumerate(places):
            up, down = pairs[2 * index], pairs[2 * index + 1]
            if target in targets:
                expected = adapter.factors[target].delta().flatten(1)
                error = (up.flatten(1) @ down.flatten(1)).sub_(expected).abs_()
                assert bool((error <= expected.abs_().add_(1.0).mul_(1e-5)).all())
            else:
                assert not up.any()


def test_another_scale_is_folded_into_up() -> None:
    adapter = Adapter({ATTENTION: factors(ATTENTION, 2, 0.7)})
    back = cloneofsimo.parse(*cloneofsimo.render(adapter)).factors[ATTENTION]
    assert back.alpha == 2.0
    torch.testing.assert_close(back.delta(), adapter.factors[ATTENTION].delta(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda tensors, _: tensors.pop("unet:7:up"), "unet:7:up"),
        (lambda tensors, _: tensors.pop("unet:143:down"), "unet:143:down"),
        (lambda tensors, _: tensors.update({"unet:4:up": torch.ones(3, 1)}), "unet"),
        (lambda tensors, _: tensors.update({"unet:4:up": torch.ones(320, 5)}), "ff.net|attn2"),
        (
            lambda tensors, _: [tensors.pop(f"unet:{index}:{side}") for index in (142, 143) for side in ("up", "down")],
            "unet",
        ),
        (lambda _, metadata: metadata.update({"lora_pipeline": "[]"}), "lora_pipeline"),
        (lambda _, metadata: metadata.update({"lora_pipeline": '{"provenance": 3}'}), "lora_pipeline"),
    ],
)
def test_what_is_wrong_is_refused_by_name(change: Callable[..., object], where: str) -> None:
    tensors, metadata = cloneofsimo.render(Adapter({UP: factors(UP, 1, 1.0), ATTENTION: factors(ATTENTION, 1, 1.0)}))
    change(tensors, metadata)
    with pytest.raises(CorruptError, match=where):
        cloneofsimo.parse(tensors, metadata)


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter({"unet.conv_in": LoraFactors(torch.ones(1, 4, 3, 3), torch.ones(320, 1, 1, 1), 1.0)}),
        Adapter({"unet.mid_block.attentions.0.to_q": LoraFactors(torch.ones(1, 4), torch.ones(6, 1), 1.0)}),
        Adapter({}, embeddings_2={"<a>": torch.ones(1, 4)}),
        Adapter({}, foreign={"x": torch.ones(1)}),
        Adapter({}, {"unet:a": torch.ones(1, 4)}),
        Adapter({CLIP: factors(CLIP, 1, 1.0)}, magnitudes={CLIP: torch.ones(768, 1)}),
    ],
)
def test_what_the_format_cannot_hold_is_refused(adapter: Adapter) -> None:
    with pytest.raises(CorruptError):
        cloneofsimo.render(adapter)


def test_a_published_file_is_read_whole_and_written_back(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "analog_svd_rank4.safetensors"
    sums = dict(line.split()[::-1] for line in (shared_data / "SHA256SUMS").read_text().splitlines())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[path.name]
    adapter = load_adapter(path)
    assert adapter.provenance == {"order": LEGACY}
    assert not adapter.foreign
    assert sorted(target.partition(".")[0] for target in adapter.factors) == ["text_encoder"] * 48 + ["unet"] * 144
    assert {each.rank for each in adapter.factors.values()} == {4}
    assert tuple(adapter.factors[UP].up.shape) == (2560, 4)
    save(adapter, tmp_path / "x", "cloneofsimo")
    (before, said), (after, says) = read_tensors(path), read_tensors(tmp_path / "x")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert {key: sorted(json.loads(text)) if text.startswith("[") else text for key, text in said.items()} == {
        key: sorted(json.loads(text)) if text.startswith("[") else text for key, text in says.items()
    }
