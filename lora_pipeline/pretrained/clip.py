"""A CLIP as scorer, for pictures of the real world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lora_pipeline.errors import CorruptError

AT_ONCE = 16
CLIP_SCORE_WEIGHT = 2.5  # Hessel et al. 2021 (CLIPScore), section 3: cosines of good captions reach about 0.4


class ClipScorer:
    """The CLIP in a local folder. Pictures are uint8 (n, height, width, 3).

    Identity and style are the same image embedding: CLIP does not separate them.

    Raises:
        CorruptError: The folder cannot be read as a CLIP.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorruptError(str(folder), f"cannot be read as a CLIP ({reason})", "copy the folder again") from error
        self.model.float().eval()

    @torch.inference_mode()
    def identity(self, images: np.ndarray) -> Tensor:
        """Unit rows (n, d): the projected image embeddings."""
        rows = []
        for start in range(0, len(images), AT_ONCE):
            pixels = self.processor(list(images[start : start + AT_ONCE]), return_tensors="pt").pixel_values
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            rows.append(F.normalize(self.model.visual_projection(pooled), dim=-1))
        return torch.cat(rows)

    def style(self, images: np.ndarray) -> Tensor:
        """The same as `identity`."""
        return self.identity(images)

    @torch.inference_mode()
    def prompt_accuracy(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """(n,) in [0, 1]: CLIPScore, 2.5 times the cosine of picture and prompt, cut to the range."""
        told = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(**told).pooler_output
        words = F.normalize(self.model.text_projection(pooled), dim=-1)
        cosines: np.ndarray = (self.identity(images) * words).sum(-1).numpy()
        return np.clip(CLIP_SCORE_WEIGHT * cosines, 0.0, 1.0)
