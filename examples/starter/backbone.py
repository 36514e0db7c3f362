"""The starter backbone: its timm name and arguments, its preprocessing, its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
MODEL = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}
SIZE = 32
PREPROCESS: dict[str, Any] = {
    "input_size": [3, SIZE, SIZE],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "exif": True,
}


def create(num_classes: int) -> nn.Module:
    """Return the untrained model with a classifier of ``num_classes`` (0: none)."""
    model: nn.Module = timm.create_model(
        MODEL, pretrained=False, num_classes=num_classes, **MODEL_ARGS
    )
    return model


def save(model: nn.Module, path: Path, *, class_names: list[str], pretraining: str) -> None:
    """Write the weights as float16 to ``path`` and the description beside it as JSON."""
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    save_file(state, path)
    description = {
        "model": MODEL,
        "model_args": MODEL_ARGS,
        "preprocess": PREPROCESS,
        "class_names": class_names,
        "pretraining": pretraining,
    }
    path.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")


def load(path: Path) -> nn.Module:
    """Return the model with the weights of ``path``, widened to float32, in eval mode."""
    description = json.loads(path.with_suffix(".json").read_text())
    model = create(len(description["class_names"]))
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval()


def resize(images: np.ndarray) -> np.ndarray:
    """Resize square grey or RGB images as ``PREPROCESS`` says; uint8 [n, 32, 32, 3]."""
    return np.stack(
        [
            np.asarray(Image.fromarray(image).convert("RGB").resize((SIZE, SIZE), Image.BICUBIC))
            for image in images
        ]
    )


def normalize(pixels: np.ndarray) -> torch.Tensor:
    """Turn uint8 [n, 32, 32, 3] into the model's float32 input [n, 3, 32, 32], in -1 .. 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
