"""What computes the logits: the one-method protocol, and the choice by device name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.errors import SessionError

Images = NDArray[np.float32]
Ids = NDArray[np.int64]
Bank = NDArray[np.float32]


class Backend(Protocol):
    """One compiled graph, ready to run. `run` may be called from several threads."""

    @property
    def name(self) -> str:
        """What computes, e.g. ``onnxruntime CPUExecutionProvider``."""

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """Logits float32 [batch, classes]; ``ids`` None for a folded graph."""

    def close(self) -> None:
        """Free the graph. Calling `run` after it is an error."""


@dataclass(frozen=True)
class BackendOptions:
    """How to open a graph.

    Attributes:
        precision: key of the manifest's graphs.
        threads: of one run; None leaves it to the runtime.
    """

    precision: str
    threads: int | None


Opener = Callable[[Path, "Bank | None", BackendOptions], Backend]


def _open_onnxruntime(device: str) -> Opener:
    def open_it(graph: Path, bank: Bank | None, options: BackendOptions) -> Backend:
        from hhdeploy.runtime.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(graph, bank, device, options)

    return open_it


def _open_openvino(graph: Path, bank: Bank | None, options: BackendOptions) -> Backend:
    from hhdeploy.runtime.openvino_backend import OpenVinoBackend

    return OpenVinoBackend(graph, bank, options)


DEVICES: dict[str, Opener] = {
    "cpu": _open_onnxruntime("cpu"),
    "cuda": _open_onnxruntime("cuda"),
    "openvino": _open_openvino,
}


def open_backend(
    bundle: Bundle, bank: Bank | None, device: str, options: BackendOptions
) -> Backend:
    """Open a bundle's graph on a device.

    Raises:
        SessionError: an unknown device, or one that this machine does not have.
        BundleError: no graph of the precision, or a file that was changed.
        MissingDependencyError: the device's runtime is not installed.
    """
    if device == "auto":
        device = choose_device()
    if device not in DEVICES:
        raise SessionError(f"unknown device {device!r}: expected auto, {', '.join(DEVICES)}.")
    return DEVICES[device](bundle.graph(options.precision), bank, options)


def choose_device() -> str:
    """``cuda`` where ONNX Runtime can use a GPU, else ``cpu``."""
    from hhdeploy.runtime.onnxruntime_backend import cuda_available

    return "cuda" if cuda_available() else "cpu"
