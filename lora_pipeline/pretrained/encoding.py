"""Prompts to what the UNet reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_pipeline.adapters.targets import TEXT_ENCODER_2
from lora_pipeline.errors import ParamsError
from lora_pipeline.injection.tokens import expand
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.denoising import Conditioning


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids, int64 (n, tokens), padded to the base's prompt length.

    Raises:
        ParamsError: A prompt has more tokens than the base reads.
    """
    expanded = [expand(tokenizer, prompt) for prompt in prompts]
    length = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(expanded).input_ids, strict=True):
        if len(ids) > length:
            problem = f"has {len(ids) - 2} tokens, and the base reads {length - 2}"
            raise ParamsError(f"the prompt {prompt!r}", problem, "shorten it")
    return torch.tensor(tokenizer(expanded, padding="max_length", max_length=length).input_ids)


def encode_prompts(components: Components, prompts: Sequence[str]) -> Conditioning:
    """Prompts as the base was trained to read them.

    Stable Diffusion 1.x and 2.x read their text encoder's last hidden states, after its final norm; SDXL the last but
    one of both encoders, side by side, and the second's projection of where the prompt ends.

    Raises:
        ParamsError: See `tokenize`.
    """
    if components.text_encoder_2 is None:
        read = tokenize(components.tokenizer, prompts).to(components.text_encoder.device)
        return Conditioning(components.text_encoder(read).last_hidden_state)
    ids = {
        prefix: tokenize(tokenizer, prompts).to(encoder.device)
        for prefix, (tokenizer, encoder) in components.readers.items()
    }
    outputs = {
        prefix: encoder(ids[prefix], output_hidden_states=True) for prefix, (_, encoder) in components.readers.items()
    }
    states = torch.cat([output.hidden_states[-2] for output in outputs.values()], dim=-1)
    ends = _ends(components.tokenizer_2, ids[TEXT_ENCODER_2])
    last: Tensor = outputs[TEXT_ENCODER_2].last_hidden_state
    pooled: Tensor = components.text_encoder_2.text_projection(last[torch.arange(len(ends)), ends])
    if components.empty_is_zero:
        told = torch.tensor([bool(prompt.strip()) for prompt in prompts], device=states.device)
        states, pooled = states * told.view(-1, 1, 1), pooled * told.view(-1, 1)
    return Conditioning(states, pooled)


def _ends(tokenizer: Any, ids: Tensor) -> Tensor:
    """Where prompts end. The encoder's own pooling may look for the largest id, which a placeholder would have."""
    ends: Tensor = (ids == tokenizer.eos_token_id).int().argmax(dim=-1)
    return ends
