"""diffusers as the client of our embedding files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_pipeline.adapters import load_adapter
from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats import save

Load = Callable[..., Any]


def rows_of(pipeline: Any, token: str, vectors: int) -> torch.Tensor:
    names = [token, *(f"{token}_{index}" for index in range(1, vectors))]
    ids = [pipeline.tokenizer.convert_tokens_to_ids(name) for name in names]
    return torch.stack([pipeline.text_encoder.get_input_embeddings().weight[each] for each in ids]).detach()


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("form", "name"), [("learned_embeds", "x.safetensors"), ("a1111", "x.pt")])
def test_diffusers_loads_our_embedding(tmp_path: Path, pipeline: Load, form: str, name: str, vectors: int) -> None:
    rows = torch.randn(vectors, 16, generator=torch.Generator().manual_seed(vectors))
    save(Adapter({}, {"<zorp>": rows}), tmp_path / name, form)
    loaded = pipeline()
    loaded.load_textual_inversion(tmp_path / name)
    torch.testing.assert_close(rows_of(loaded, "<zorp>", vectors), rows, rtol=0, atol=0)


def test_each_encoders_rows_load_as_diffusers_documents_it_for_sdxl(tmp_path: Path, pipeline: Load) -> None:
    from safetensors.torch import load_file

    first, second = torch.ones(2, 16), torch.full((2, 16), 2.0)
    save(Adapter({}, {"<zorp>": first}, {}, {}, {"<zorp>": second}), tmp_path / "x.safetensors", "emb_params")
    state = load_file(tmp_path / "x.safetensors")
    for key, rows in (("clip_l", first), ("clip_g", second)):
        loaded = pipeline()
        loaded.load_textual_inversion(
            state[key], token="<zorp>", text_encoder=loaded.text_encoder, tokenizer=loaded.tokenizer
        )
        assert torch.equal(rows_of(loaded, "<zorp>", 2), rows)


def test_we_read_what_safetensors_itself_wrote(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    rows = torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    save_file({"<cat>": rows}, tmp_path / "learned_embeds.safetensors")
    assert torch.equal(load_adapter(tmp_path / "learned_embeds.safetensors").embeddings["<cat>"], rows)
