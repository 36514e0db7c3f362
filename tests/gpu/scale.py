"""How much the check does: on a GPU, or in a dry run on the CPU in its place."""

from __future__ import annotations

import os
from dataclasses import dataclass

# The same code on ONNX Runtime's CPU provider with a tiny model: its figures mean nothing.
DRY = os.environ.get("GPU_DRY", "") not in ("", "0")


@dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    Attributes:
        providers: devices of ONNX Runtime -> the execution provider that must compute.
        models: of `Workbench.model`, compared with their references.
        model: the one that speed, serving and memory are measured with.
        batches: that speed is measured with.
        slots: of the large bank, against two.
        pairs: of interleaved runs behind every ratio.
        warmup: of runs before them.
        seconds: that a server is under load.
        adapters: how many, for memory.
        changes: adapters added and removed while requests run.
    """

    providers: dict[str, str]
    models: tuple[str, ...]
    model: str
    batches: tuple[int, ...]
    slots: int
    pairs: int
    warmup: int
    seconds: float
    adapters: tuple[int, ...]
    changes: int


_GPU = Scale(
    providers={
        "cuda": "CUDAExecutionProvider",
        "ort-tensorrt": "TensorrtExecutionProvider",
        "ort-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    },
    models=("starter", "vit-s"),
    model="vit-s",
    batches=(1, 8, 32),
    slots=1024,
    pairs=50,
    warmup=10,
    seconds=60.0,
    adapters=(1, 100, 1000),
    changes=50,
)
_TINY = Scale(
    providers={"cuda": "CPUExecutionProvider"},
    models=("tiny",),
    model="tiny",
    batches=(1, 3, 5),
    slots=64,
    pairs=2,
    warmup=1,
    seconds=0.5,
    adapters=(1, 10),
    changes=3,
)
SCALE = _TINY if DRY else _GPU
