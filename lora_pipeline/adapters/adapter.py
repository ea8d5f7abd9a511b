"""What every file format is read into: factors by target, embeddings by token, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from lora_pipeline.adapters.keys import context_width, family_of_width
from lora_pipeline.adapters.lora import LoraFactors
from lora_pipeline.adapters.targets import is_target
from lora_pipeline.errors import CorruptError

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything one file changes in a base.

    Args:
        factors: By target name (see `targets`).
        embeddings: By placeholder token, each (vectors, dim), for the (first) text encoder.
        provenance: Where it comes from. `base` is the fingerprint of the base it was made for, `parents` what it was
            made of; the rest is free.
        foreign: Tensors of the file it was read from that mean nothing here, by their names there. They are carried
            along, and whoever would have to understand them refuses (`check_understood`).
        embeddings_2: As `embeddings`, for SDXL's second text encoder.
        magnitudes: By target name, DoRA's norms of the changed weight (Liu et al. 2024, arXiv:2402.09353): with them
            W' = m (W + delta) / ||W + delta||, which is no low-rank change, see `check_understood`. Shaped to
            broadcast against the weight: (out, 1[, 1, 1]) norms of rows, or (1, in[, 1, 1]) norms of columns.

    Raises:
        CorruptError: A name that is no target, an embedding that is not (vectors, dim), a magnitude without factors.
    """

    factors: Mapping[str, LoraFactors]
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Json] = field(default_factory=dict)
    foreign: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings_2: Mapping[str, Tensor] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.factors:
            if not is_target(name):
                fix = "use names like unet.mid_block... or text_encoder.text_model.encoder..."
                raise CorruptError(name, "is not the name of a layer of a UNet or a CLIP text encoder", fix)
        for token, rows in (*self.embeddings.items(), *self.embeddings_2.items()):
            if rows.ndim != 2 or rows.numel() == 0 or not token or token != token.strip():
                problem = f"an embedding of shape {tuple(rows.shape)} for token {token!r}"
                raise CorruptError(token, problem, "use (vectors, dim) rows under a token without outer blanks")
            if not rows.is_floating_point():
                raise CorruptError(token, f"an embedding of whole numbers ({rows.dtype})", "get the file again")
        for target in self.magnitudes:
            if target not in self.factors:
                raise CorruptError(target, "has a DoRA magnitude and no factors", "get the file again")


def check_understood(where: str, adapter: Adapter) -> None:
    """Refuses an adapter of which a part would be lost.

    Args:
        where: The file to name in the error.
        adapter: What is to be used.

    Raises:
        CorruptError: It is a DoRA, whose change depends on the base's weights, or holds foreign tensors.
    """
    if adapter.magnitudes:
        problem = f"is a DoRA ({min(adapter.magnitudes)} has a magnitude), whose change depends on the base"
        raise CorruptError(where, problem, "make a plain adapter of it: lora-pipe convert IN OUT --base BASE")
    check_known(where, adapter)


def check_known(where: str, adapter: Adapter) -> None:
    """Refuses foreign tensors.

    Args:
        where: The file to name in the error.
        adapter: What is to be used, with its base at hand.

    Raises:
        CorruptError: There are some.
    """
    if adapter.foreign:
        some = ", ".join(sorted(adapter.foreign)[:3])
        problem = f"holds {len(adapter.foreign)} tensors of an unknown kind ({some})"
        raise CorruptError(where, problem, "use a program that knows them, or a version of the file without them")


def check_family(where: str, adapter: Adapter, base: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses an adapter of another family of Stable Diffusion, told by the width of what its cross-attention reads.

    Args:
        where: The file to name in the error.
        adapter: What is to be used.
        base: Shapes of the base's weights by target.

    Raises:
        CorruptError: The widths differ.
    """
    changes = {target: (each.up.shape[0], each.down.shape[1]) for target, each in adapter.factors.items()}
    made_for, given = context_width(changes), context_width(base)
    if None not in (made_for, given) and made_for != given:
        wanted, found = (family_of_width(width) or "another model" for width in (made_for, given))
        problem = f"is made for {wanted} (width {made_for}), the base is {found} (width {given})"
        raise CorruptError(where, problem, "give a base of the family it was trained on")


def check_base(where: str, adapter: Adapter, base: str) -> None:
    """Refuses an adapter made for another base; one that does not say is let through.

    Args:
        where: The file to name in the error.
        adapter: What is to be used.
        base: The fingerprint of the base it is to be used with.

    Raises:
        CorruptError: The fingerprints differ.
    """
    made_for = adapter.provenance.get("base", base)
    if made_for != base:
        problem = f"was made for base {str(made_for)[:12]}, this base is {base[:12]}"
        raise CorruptError(where, problem, "give the base it was trained on, or train it again on this one")
