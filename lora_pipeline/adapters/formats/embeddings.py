"""Files that hold an embedding and no layers.

    learned_embeds  diffusers: {<token>: (vectors, dim) or (dim,)}
    emb_params      kohya: {emb_params: (vectors, dim)}; SDXL: {clip_l: (vectors, 768), clip_g: (vectors, 1280)}
    a1111           AUTOMATIC1111's `.pt`, see `pickles`, whose tensors come here as learned_embeds

`emb_params` names no token: users call it by the file's name, and so does `formats.load` (`UNNAMED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lora_pipeline.adapters.adapter import Adapter
from lora_pipeline.adapters.formats.provenance import read_provenance, write_provenance
from lora_pipeline.errors import CorruptError

UNNAMED = "<unnamed>"
_ROWS, _FIRST, _SECOND = "emb_params", "clip_l", "clip_g"
_TOKEN = "token"  # our own metadata key
_ELSEWHERE = "use --to native, kohya or diffusers, which hold layers and any number of tokens"


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Reads embeddings out of a file's tensors and metadata.

    Raises:
        CorruptError: A tensor that is no embedding.
    """
    token = metadata.get(_TOKEN, UNNAMED)
    names = {_ROWS: token, _FIRST: token} if tensors.keys() & {_ROWS, _FIRST, _SECOND} else {}
    first = {names.get(name, name): _as_rows(name, rows) for name, rows in tensors.items() if name != _SECOND}
    second = {token: _as_rows(_SECOND, tensors[_SECOND])} if _SECOND in tensors else {}
    return Adapter({}, first, read_provenance(metadata, own=(_TOKEN,)), {}, second)


def named(adapter: Adapter, name: str) -> Adapter:
    """The adapter with `name` for the token of a file that names none."""

    def renamed(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name if token == UNNAMED else token: each for token, each in rows.items()}

    return replace(adapter, embeddings=renamed(adapter.embeddings), embeddings_2=renamed(adapter.embeddings_2))


def render_learned_embeds(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file of one token for diffusers' `load_textual_inversion`; `parse` gives the same adapter back.

    Raises:
        CorruptError: Layers, several tokens, or rows for a second text encoder.
    """
    token = _only_token(adapter)
    if adapter.embeddings_2:
        raise CorruptError(token, "has rows for a second text encoder", "use --to emb_params")
    return {token: adapter.embeddings[token]}, write_provenance(adapter.provenance, own=(_TOKEN,))


def render_emb_params(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file of one token that kohya's scripts read, for one text encoder or SDXL's two; the inverse of `parse`.

    Raises:
        CorruptError: Layers, or several tokens.
    """
    token = _only_token(adapter)
    found = {_FIRST: adapter.embeddings.get(token), _SECOND: adapter.embeddings_2.get(token)}
    tensors = {name: rows for name, rows in found.items() if rows is not None}
    if not adapter.embeddings_2:
        tensors = {_ROWS: tensors[_FIRST]}
    return tensors, {**write_provenance(adapter.provenance, own=(_TOKEN,)), _TOKEN: token}


def _only_token(adapter: Adapter) -> str:
    if adapter.factors or adapter.foreign:
        name = min([*adapter.factors, *adapter.foreign])
        raise CorruptError(name, "is no token, and this format holds nothing else", _ELSEWHERE)
    tokens = sorted({*adapter.embeddings, *adapter.embeddings_2})
    if len(tokens) != 1:
        problem = f"are {len(tokens)} tokens, and this format holds one"
        raise CorruptError(", ".join(tokens) or "its tokens", problem, _ELSEWHERE)
    return tokens[0]


def _as_rows(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim not in (1, 2) or tensor.numel() == 0 or not tensor.is_floating_point():
        problem = f"{tensor.dtype} of shape {tuple(tensor.shape)} is no embedding"
        raise CorruptError(name, problem, "give a file of (vectors, dim) tensors")
    return tensor[None] if tensor.ndim == 1 else tensor
