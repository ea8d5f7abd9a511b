"""Which base an adapter belongs to."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_pipeline.adapters.checkpoints.torch_reader import read_contents
from lora_pipeline.errors import CorruptError, MissingError

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER_WEIGHTS = "text_encoder/model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER_2_WEIGHTS = "text_encoder_2/model.safetensors"
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
_THREADS = 4
_AT_ONCE = 1024 * 1024


def base_fingerprint(base: Path) -> str:
    """Sha-256 over the UNet's and text encoders' weight files and the tokenizer's vocabulary.

    Args:
        base: A diffusers folder, or a single file, of which all tensors count and the metadata does not.

    Raises:
        MissingError: A weight file is missing.
    """
    if base.is_file():
        return _file_fingerprint(base)
    files = [*weight_files(base, UNET_WEIGHTS), *weight_files(base, TEXT_ENCODER_WEIGHTS)]
    if (base / TEXT_ENCODER_2_WEIGHTS).parent.is_dir():
        files += weight_files(base, TEXT_ENCODER_2_WEIGHTS)
    files += [path for name in _TOKENIZER if (path := base / "tokenizer" / name).is_file()]
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            contents = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(base).as_posix()} {contents}\n".encode())
    return total.hexdigest()


def _file_fingerprint(path: Path) -> str:
    """Over each tensor's name, kind and sha-256, which several threads find several times as fast as that of a file."""
    entries = sorted(read_contents(path).tensors.items())
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda item: _range_digest(path, item[1].start, item[1].stop), entries)
        total = hashlib.sha256()
        for (name, entry), digest in zip(entries, digests, strict=True):
            total.update(f"{name} {entry.dtype} {entry.shape} {digest}\n".encode())
    return total.hexdigest()


def _range_digest(path: Path, start: int, stop: int) -> str:
    total, buffer = hashlib.sha256(), memoryview(bytearray(_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = stop - start
        while left and (size := file.readinto(buffer[: min(left, _AT_ONCE)])):
            total.update(buffer[:size])
            left -= size
    return total.hexdigest()


def weight_files(base: Path, name: str) -> list[Path]:
    """A component's weight file, or its shards.

    Args:
        base: A diffusers folder.
        name: The unsharded file's path inside it.

    Raises:
        MissingError: Neither the file nor an index of shards, or a shard of the index is missing.
        CorruptError: The index cannot be read, or leads out of its folder.
    """
    whole, index = base / name, base / f"{name}.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise MissingError(str(whole), "no such file", "give a diffusers folder with safetensors weights")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptError(str(index), "is no index of shards", "get the base again") from None
    for shard in names:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CorruptError(str(index), f"the shard {shard!r} is outside the folder", "get the base again")
        if not (index.parent / shard).is_file():
            raise MissingError(str(index.parent / shard), "no such shard", "get the base again")
    return [index.parent / shard for shard in names]
