"""A small ViT of transformers, saved as transformers saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SMALL_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 80,
}


def save_small_vit(path: Path, **config: Any) -> Path:
    """A directory of save_pretrained with random weights; ``config`` extends `SMALL_VIT`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    made = transformers.ViTConfig(**SMALL_VIT, **config)
    transformers.ViTForImageClassification(made).save_pretrained(path)
    return path
