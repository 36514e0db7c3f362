"""The question: models, adapters, batches and the truth. Imports nothing that weighs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import work_directory

BATCH, CLASSES, RANK, SCALE = 8, 10, 8, 2.0
BANKS = (1, 8, 64)
MODELS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
# Error over the range of the truth up to which answers are right, by the precision promised.
BOUNDS = {"float32": 1e-4, "int8": 0.1}
Array = NDArray[np.float32]


def task(index: int) -> str:
    """An adapter's name."""
    return f"task{index}"


def mixes(bank: int, batch: int = BATCH) -> list[tuple[int, ...]]:
    """Batches of adapters' numbers that together use the whole bank, all in a batch different
    where the bank has so many."""
    return [
        tuple((start + i) % bank for i in range(batch)) for start in range(0, max(bank, 1), batch)
    ]


def by_task(names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Name -> places in the batch: who takes one adapter a run has as few runs as can be."""
    for name in dict.fromkeys(names):
        yield name, [i for i, other in enumerate(names) if other == name]


@dataclass(frozen=True)
class Case:
    """The files of one model.

    Attributes:
        title: as the tables call it.
    """

    title: str

    @property
    def model(self) -> str:
        """timm's name."""
        return MODELS[self.title]

    @property
    def folder(self) -> Path:
        """Where `benchmarks.peers.prepare` keeps everything."""
        return work_directory() / "peers" / self.model

    @property
    def weights(self) -> Path:
        """The bare model's state, safetensors."""
        return self.folder / "base.safetensors"

    @property
    def graph(self) -> Path:
        """The bare model as torch exports it, weights inside."""
        return self.folder / "base.onnx"

    @property
    def graph_with_inputs(self) -> Path:
        """The same with LoRA and head as inputs that have defaults, for ``.onnx_adapter``."""
        return self.folder / "lora.onnx"

    @property
    def bundle(self) -> Path:
        """hhdeploy's, side branches in float32 and INT8, ``task0`` alone in it."""
        return self.folder / "bundle"

    def peft(self, name: str) -> Path:
        """An adapter as PEFT saves it."""
        return self.folder / "peft" / name

    def imported(self, name: str) -> Path:
        """The same as ``hhdeploy adapter import`` converts it."""
        return self.folder / "imported" / name

    def onnx_adapter(self, name: str) -> Path:
        """The same in ONNX Runtime's format."""
        return self.folder / "onnx_adapter" / f"{name}.onnx_adapter"

    def images(self) -> Array:
        """float32 [8, 3, 224, 224]: real images, enlarged."""
        found: Array = np.load(self.folder / "images.npy")
        return found

    def truth(self, numbers: Sequence[int]) -> NDArray[np.float64]:
        """What image i answers with adapter ``numbers[i]``, by PEFT in float64: [n, classes]."""
        table = np.load(self.folder / "truth.npy")
        return np.stack([table[number, i] for i, number in enumerate(numbers)])

    def offsets(self) -> dict[str, int]:
        """Where in `graph` the bytes of a tensor begin, by timm's name."""
        found: dict[str, int] = json.loads((self.folder / "offsets.json").read_text())
        return found


def range_error(truth: NDArray[np.float64], found: Array) -> float:
    """Greatest difference over the truth's range; infinite for another shape."""
    if truth.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(truth - found).max() / np.ptp(truth))
