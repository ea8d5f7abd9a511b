"""What files say about themselves in their headers, without torch and without reading a single weight."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_pipeline.adapters import keys, peft_folder, sources
from lora_pipeline.adapters.fingerprint import weight_files
from lora_pipeline.adapters.header import Header, TensorEntry, read_header
from lora_pipeline.adapters.recognition import PEFT, recognise
from lora_pipeline.errors import CorruptError, MissingError

CHECKPOINT, FOLDER, MERGED = "checkpoint", "diffusers folder", "merged folder"
BASES = (CHECKPOINT, FOLDER, MERGED)
_CHECKPOINT_KEY = "model.diffusion_model."
_MODEL_INDEX, _MERGE_RECORD = "model_index.json", "lora_pipeline.json"
_COMPONENTS = (
    "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip
_MAX_JSON_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Description:
    """An adapter or a base at a glance.

    Args:
        format: See `recognition`; or `checkpoint`, `diffusers folder`, `merged folder`, `unknown`.
        family: `SD1`, `SD2`, `SDXL`, or None where the widths do not tell.
        kinds: How many layers are stored as `LoRA`, `LoHa`, `LoKr`, `full`, and how many of them are a `DoRA`.
        layers: How many layers it changes, by model.
        targets: The same by part of the model: attention, resnets, ...
        ranks: How many layers have each rank.
        alphas: How many layers have each alpha, where the header tells; kohya's files keep them in tensors.
        tokens: Vectors by placeholder token.
        dtypes: How many tensors have each dtype.
        parameters: Numbers in all tensors together.
        size: Bytes of all files.
        sha256: Of the file, by file name.
        provenance: Where it comes from; empty if it does not say.
        source: What other programs wrote about it.
    """

    format: str
    family: str | None
    kinds: dict[str, int]
    layers: dict[str, int]
    targets: dict[str, dict[str, int]]
    ranks: dict[int, int]
    alphas: dict[float, int]
    tokens: dict[str, int]
    dtypes: dict[str, int]
    parameters: int
    size: int
    sha256: dict[str, str]
    provenance: dict[str, Any]
    source: dict[str, str]


def describe(path: Path) -> Description:
    """Reads a description of a safetensors file, a PEFT folder, or a diffusers folder.

    Raises:
        MissingError, CorruptError: See `read_header`; also a folder that is neither.
    """
    if not path.is_dir():
        header = read_header(path)
        return _described(_format(header), {path.name: path}, header, sources.provenance(header.metadata))
    if (path / _MODEL_INDEX).is_file():
        return _described_base(path)
    header = peft_folder.read_folder_header(path)
    files = {file.relative_to(path).as_posix(): file for file in peft_folder.weight_files(path).values()}
    return _described(PEFT, files, header, sources.provenance(header.metadata))


def _described_base(folder: Path) -> Description:
    files: dict[str, Path] = {}
    for name in _COMPONENTS:
        if (folder / name).parent.is_dir():
            files |= {path.relative_to(folder).as_posix(): path for path in weight_files(folder, name)}
    tensors: dict[str, TensorEntry] = {}
    for name, path in files.items():
        component = name.partition("/")[0]
        tensors |= {f"{component}.{key}": entry for key, entry in read_header(path).tensors.items()}
    merged = (folder / _MERGE_RECORD).is_file()
    record = sources.parsed(_text(folder / _MERGE_RECORD)) if merged else {}
    return _described(MERGED if merged else FOLDER, files, Header(tensors, {}), record)


def _described(form: str, files: Mapping[str, Path], header: Header, provenance: dict[str, Any]) -> Description:
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    is_base = form in BASES
    modules = [] if is_base else keys.modules(shapes)
    kinds = Counter(module.kind for module in modules) + Counter(DoRA=keys.magnitudes(shapes) if modules else 0)
    return Description(
        format=form,
        family=keys.family_of_width(keys.context_width(shapes)) if is_base else keys.family(modules),
        kinds=_sorted(kinds),
        layers=_sorted(Counter(module.model for module in modules)),
        targets=_by_part(modules),
        ranks=_sorted(Counter(module.rank for module in modules)),
        alphas={} if is_base else _sorted(sources.alphas(header.metadata, modules)),
        tokens={} if is_base else dict(sorted(sources.tokens(shapes, header.metadata, form).items())),
        dtypes=_sorted(Counter(entry.dtype for entry in header.tensors.values())),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        size=sum(path.stat().st_size for path in files.values()),
        sha256={name: _sha256(path) for name, path in files.items()},
        provenance=provenance,
        source=sources.summary(header.metadata),
    )


def _format(header: Header) -> str:
    if any(name.startswith(_CHECKPOINT_KEY) for name in header.tensors):
        return CHECKPOINT
    return recognise({name: entry.shape for name, entry in header.tensors.items()}, header.metadata) or "unknown"


def _by_part(modules: Iterable[keys.Module]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for module in modules:
        counts.setdefault(module.model, Counter())[module.part] += 1
    return {model: _sorted(parts) for model, parts in sorted(counts.items())}


def _sorted(counts: Mapping[Any, int]) -> dict[Any, int]:
    return dict(sorted(counts.items()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptError(str(path), "is too long for what it should hold", "get the folder again")
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise MissingError(str(path), "no such file", "get the folder again") from None
    except UnicodeDecodeError:
        raise CorruptError(str(path), "is no text", "get the folder again") from None
