"""Tiny bundles calibrated once, and pictures to calibrate them on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from PIL import Image

from hhdeploy.bundle import Bundle
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.feeds import Feed
from hhdeploy.calibration.qdq import find_sites
from hhdeploy.calibration.quantised import Float32Graph, find_scales
from hhdeploy.calibration.scales import Calibration
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.graph import GraphLinear
from tests.once import made_once

ADAPTERS = ("alpha", "rival", "beta", "gamma", "headless", "backbone")


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """``count`` blurred noise pictures of unequal sides."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
        Image.fromarray(coarse).resize((41, 37)).save(folder / f"{index}.png")


def draw(root: Path) -> None:
    """DIR/ADAPTER/CLASS/image for every adapter of the `branches` bundle, and the backbone."""
    for number, adapter in enumerate(ADAPTERS):
        for label in ("a", "b"):
            write_pictures(root / adapter / label, 3, 10 * number + ord(label))


@pytest.fixture(scope="session")
def pictures() -> Path:
    """What `draw` draws. Read only."""
    return made_once("pictures", draw)


@dataclass(frozen=True)
class Calibrated:
    """A bundle, its float32 graph and its calibration."""

    bundle: Bundle
    data: CalibrationData
    calibration: Calibration

    @property
    def path(self) -> Path:
        return self.bundle.graph("float32")

    @property
    def graph(self) -> Float32Graph:
        return Float32Graph.open(self.bundle)

    @property
    def classifier(self) -> str:
        name: str = self.bundle.manifest.backbone.classifier
        return name

    @property
    def feeds(self) -> list[Feed]:
        return list(self.data)

    def sites(self) -> dict[str, GraphLinear]:
        """Of a graph of the caller's own."""
        return find_sites(ir.load(self.path).graph, self.classifier)


def calibrated(path: Path, folder: Path) -> Calibrated:
    """A shared bundle, calibrated with the default settings."""
    bundle = Bundle.open(path)
    data = CalibrationData.open(bundle, folder, images=36, seed=0)
    graph, settings = Float32Graph.open(bundle), CalibrationSettings()

    def calibrate(cache: Path) -> Calibration:
        return find_scales(graph, data, settings, cache=cache)

    return Calibrated(bundle, data, calibrate(made_once(f"scales-{path.name}", calibrate)))


@pytest.fixture(scope="session")
def side(branches, pictures) -> Calibrated:
    """Five adapters and the backbone as side branches."""
    return calibrated(branches, pictures)


@pytest.fixture(scope="session")
def plain(folded, pictures) -> Calibrated:
    """One adapter folded."""
    return calibrated(folded, pictures)


def logits(path: Path, feeds: list[Feed]) -> NDArray[np.float32]:
    """A graph's answers in ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact everywhere
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], feed)[0] for feed in feeds])


def saved(model: ir.Model, folder: Path) -> Path:
    """The graph as files, weights beside it."""
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=256)
    return path
