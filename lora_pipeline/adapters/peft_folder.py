"""Where the parts of a PEFT folder lie, and the names they get when it is read like one file. Needs no torch.

Files: `adapter_config.json` and `adapter_model.safetensors`, either in the folder itself, which is then for one model
that its keys tell, or in its sub-folders `unet`, `text_encoder` and `text_encoder_2`. Ours beside them:
`learned_embeds.safetensors`, and `learned_embeds_2.safetensors` for SDXL's second encoder, with one tensor a token.

As one file: tensors `<model>.<key>`, `embedding.<token>` and `embedding_2.<token>`; metadata that of the files, and
`<model>.adapter_config` with the configuration's text.
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_pipeline.adapters.header import MAX_HEADER_BYTES, Header, read_header
from lora_pipeline.adapters.targets import MODELS, TEXT_ENCODER_2, model_of
from lora_pipeline.errors import CorruptError, MissingError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = {"embedding": "learned_embeds.safetensors", "embedding_2": "learned_embeds_2.safetensors"}
BASE_MODEL = "base_model.model."
CONFIG_SUFFIX = ".adapter_config"
# SDXL's second encoder projects, and has 32 layers where the others have 12 (SD 1.x) or 23 (SD 2.x).
_OF_SECOND = re.compile(r"(text_model\.)?(encoder\.layers\.(2[4-9]|3\d)|text_projection)\.")


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors files of a folder, by what their tensors' names get before them.

    Raises:
        CorruptError: It is no PEFT folder, or for no model of ours, or for one model twice.
        MissingError: A configuration without weights.
    """
    files = {model: folder / model / WEIGHTS for model in MODELS if (folder / model / CONFIG).is_file()}
    if (folder / CONFIG).is_file():
        model = _model(folder / WEIGHTS)
        if model in files:
            raise CorruptError(str(folder), f"holds two adapters for the {model}", f"take {model}/ or {CONFIG} out")
        files[model] = folder / WEIGHTS
    for path in files.values():
        _check_weights(path)
    files |= {prefix: folder / name for prefix, name in EMBEDDINGS.items() if (folder / name).is_file()}
    if not files:
        problem = f"is a folder, and no PEFT folder: there is no {CONFIG}"
        raise CorruptError(str(folder), problem, "give a file inside it")
    return files


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter, or nothing yet."""
    configs = [folder / CONFIG, *(folder / model / CONFIG for model in MODELS)]
    return any(config.is_file() for config in configs) or not any(folder.iterdir())


def read_configs(files: dict[str, Path]) -> dict[str, str]:
    """The text of each model's configuration, under its name as metadata.

    Raises:
        CorruptError: One is too large to be one, or no text.
    """
    return {model + CONFIG_SUFFIX: _text(path.with_name(CONFIG)) for model, path in files.items() if model in MODELS}


def read_folder_header(folder: Path) -> Header:
    """The headers of a folder's files as one; the offsets in it are those in the files.

    Raises:
        CorruptError, MissingError: See `weight_files`, `read_configs` and `read_header`.
    """
    files = weight_files(folder)
    headers = {prefix: read_header(path) for prefix, path in files.items()}
    metadata = {key: text for header in headers.values() for key, text in header.metadata.items()}
    tensors = {f"{prefix}.{key}": entry for prefix, header in headers.items() for key, entry in header.tensors.items()}
    return Header(tensors, metadata | read_configs(files))


def _model(path: Path) -> str:
    _check_weights(path)
    keys = [key.removeprefix(BASE_MODEL) for key in read_header(path).tensors]
    models = {model for key in keys if (model := model_of(key)) is not None}
    if len(models) != 1:
        problem = f"is for neither a UNet nor a CLIP text encoder ({min(keys, default='no tensor at all'):.100})"
        raise CorruptError(str(path), problem, "give an adapter of Stable Diffusion 1.x, 2.x or SDXL")
    return TEXT_ENCODER_2 if any(map(_OF_SECOND.match, keys)) else models.pop()


def _check_weights(path: Path) -> None:
    if not path.is_file():
        fix = "save it with safe_serialization=True: a .bin is a pickle, which can run code when it is read"
        raise MissingError(str(path), f"is missing beside its {CONFIG}", fix)


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise CorruptError(str(path), f"has {path.stat().st_size} bytes", "get the folder again")
    try:
        return path.read_text("utf-8")
    except ValueError:
        raise CorruptError(str(path), "is no text", "get the folder again") from None
