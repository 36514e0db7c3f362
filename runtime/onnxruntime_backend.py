"""ONNX Runtime behind the `Backend` protocol: opening a graph, on the CPU and on NVIDIA GPUs.

No GPU has run the GPU half yet; see `onnxruntime_gpu` for its other part.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle.manifest import Manifest
from hhdeploy.choices import Runner
from hhdeploy.errors import (
    BundleError,
    DeviceError,
    MissingDependencyError,
    SessionError,
    require,
)
from hhdeploy.runtime.backends import (
    Backend,
    BackendOptions,
    Bank,
    Ids,
    Images,
    check_tensors,
    closed,
    side_by_side,
)
from hhdeploy.runtime.cuda import driver_library
from hhdeploy.runtime.processor import overflows_in_int8

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
# CUDA's float32 products would be rounded to TensorFloat-32, which is another precision.
_PROVIDER_OPTIONS = {"cuda": {"use_tf32": "0"}}
_RECORDING = {"cuda": {"enable_cuda_graph": "1"}}
# What must not be left to the CPU; see `_placed`.
PRODUCTS = ("Conv", "Gemm", "MatMul")


def open_onnxruntime(
    graph: Path,
    bank: Bank | None,
    device: Runner,
    options: BackendOptions,
    manifest: Manifest,
) -> Backend:
    """Load a graph into ONNX Runtime; ``manifest`` says what it takes and gives.

    Raises:
        SessionError: this build or this machine lacks the device's execution provider; nothing
            is left to another one in silence.
        BundleError: a graph that does not load, or takes or gives others.
        DeviceError: the GPU refused.
    """
    ort = require("onnxruntime", "cpu" if device == "cpu" else "gpu", f"`device={device!r}`")
    session, mapped = _open_session(ort, graph, device, options)
    takes, gives = (
        {value.name: value.shape for value in values}
        for values in (session.get_inputs(), session.get_outputs())
    )
    check_tensors(graph, takes, gives, manifest)
    name = f"onnxruntime {_PROVIDERS[device]}"
    if device == "cpu":
        return OnnxRuntimeBackend(session, bank, name, mapped)
    from hhdeploy.runtime.onnxruntime_gpu import OnnxRuntimeGpuBackend, OnnxRuntimeGraphBackend

    if device == "cuda":
        name += _placed(session, _PROVIDERS[device], ort.__version__)
    kind = OnnxRuntimeGraphBackend if options.cuda_graphs else OnnxRuntimeGpuBackend
    return kind(ort, session, bank, name)


def _open_session(
    ort: ModuleType, graph: Path, device: Runner, options: BackendOptions
) -> tuple[Any, Mapped | None]:
    """The session, and the file that it goes on reading, if any."""
    provider, there = _PROVIDERS[device], ort.get_available_providers()
    if provider not in there:
        raise SessionError(
            f"`device={device!r}` needs ONNX Runtime's {provider}, this build has "
            f"{', '.join(there)}. Install it with: pip uninstall onnxruntime && pip install "
            "'hhdeploy[gpu]'"
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if device.startswith("ort-tensorrt"):
        # TensorRT takes the whole graph or is not what was asked for. Not so for CUDA: there
        # ONNX Runtime leaves the shapes of a dynamic batch to the CPU on purpose.
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if device == "cpu" and overflows_in_int8() is not False:
        # Other kernels than those that overflow in silence. Not where none does: with AMX these
        # are many times slower.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    if device == "cuda":
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if device != "cpu":
        from hhdeploy.runtime.onnxruntime_gpu import preload_libraries

        preload_libraries(ort)
    chosen = dict(_PROVIDER_OPTIONS.get(device, {}))
    if options.cuda_graphs:
        chosen |= _RECORDING[device]
    weights = graph.with_name(f"{graph.name}.data")
    # A GPU has weights of its own; a graph of a single file is read whole.
    stays = device == "cpu" and weights.exists()
    try:
        handed = _hand_over(settings, weights) if stays else None
        mapped = Mapped(weights) if stays and handed is None else None
        session = ort.InferenceSession(
            str(graph),
            settings,
            providers=[(provider, chosen)],
            enable_fallback=0,  # else a failing GPU is replaced by the CPU, and a line printed
        )
    except Exception as error:
        failure = BundleError if device == "cpu" else DeviceError
        raise failure(f"ONNX Runtime cannot load {graph} with {provider}: {error}") from error
    if handed is not None:
        del handed
        _trim()
    if session.get_providers()[0] != provider:
        raise SessionError(
            f"ONNX Runtime could not start {provider} on this machine and would have used "
            f"{session.get_providers()[0]}. Check the driver with: hhdeploy doctor"
        )
    return session, mapped


def _hand_over(settings: Any, weights: Path) -> NDArray[np.uint8] | None:
    """Give ONNX Runtime a graph's weights in memory, of which it copies what it needs.

    Left alone it maps what it does not pack, for as long as the session is open: a file that
    becomes shorter then ends the process, see `Mapped` for the rest.

    Returns:
        What must live until the session is made: a mapping, which takes no memory of its own.
        None before ONNX Runtime 1.24, which reads the file itself.
    """
    give = getattr(settings, "add_external_initializers_from_files_in_memory", None)
    if give is None:
        return None
    content = np.memmap(weights, np.uint8, mode="r")
    give([weights.name], [content], [content.size])
    return content


def _trim() -> None:
    """What opening took goes back to the kernel, with glibc: a third of the weights' size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _placed(session: Any, provider: str, version: str) -> str:
    """What of a graph its provider leaves to another one, in words; "" if nothing.

    ONNX Runtime leaves shapes to the CPU on purpose. A matrix product there, e.g. of a type that
    the GPU's kernels lack, is an error.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return f" (onnxruntime {version} does not tell which nodes run there)"
    nodes = [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    left = Counter(kind for where, kind in nodes if where != provider)
    if not left:
        return ""
    products = {kind: n for kind, n in left.items() if any(name in kind for name in PRODUCTS)}
    if products:
        raise DeviceError(
            f"{provider} leaves {sum(products.values())} of the graph's products to the CPU "
            f"({', '.join(sorted(products))}). Use another precision, or `device='cpu'`."
        )
    kinds = ", ".join(sorted(left))
    return f" ({left.total()} of {len(nodes)} nodes on the CPU: {kinds})"


class Mapped:
    """A file that ONNX Runtime computes with where it lies; held open, as its name may pass on.

    What is written into it changes answers in silence; so they are not given out then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._state = self._now()

    def check(self) -> None:
        """Raises `BundleError` if the file was written since."""
        if self._now() != self._state:
            raise BundleError(
                f"{self._path} was written while it is in use: answers would be another model's. "
                "Put the new bundle beside the old one and start again, or use onnxruntime 1.24 "
                "or newer, or `device='openvino'`, which hold weights in memory."
            )

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns


class OnnxRuntimeBackend:
    """One InferenceSession on the CPU; the bank is handed over by reference, never copied."""

    def __init__(
        self, session: Any, bank: Bank | None, name: str, mapped: Mapped | None = None
    ) -> None:
        """``mapped``: the file that the session goes on reading, if any."""
        self._session = session
        self._mapped = mapped
        self._bank = bank
        self._outputs = [output.name for output in session.get_outputs()]
        self.name = name

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`.

        Raises:
            DeviceError: ONNX Runtime failed, e.g. out of memory. BundleError: see `Mapped`.
            SessionError: it is closed.
        """
        session = self._session
        if session is None:
            raise closed()
        feeds: dict[str, NDArray[Any]] = {"images": images}
        if ids is not None:
            feeds["adapter_ids"] = ids
        if self._bank is not None:
            feeds["adapter_bank"] = self._bank
        try:
            outputs: list[NDArray[np.float32]] = session.run(self._outputs, feeds)
        except Exception as error:  # its exceptions have no base of their own
            raise DeviceError(f"{self.name} failed: {error}") from error
        if self._mapped is not None:
            self._mapped.check()
        return side_by_side(outputs)

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: the next run reads the bank as it is."""

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None


def cuda_available() -> bool:
    """True if ONNX Runtime is there, was built for CUDA, and the machine has the driver."""
    try:
        ort = require("onnxruntime", "cpu", "a session")
        if _PROVIDERS["cuda"] not in ort.get_available_providers():
            return False
        ctypes.CDLL(driver_library())
    except (MissingDependencyError, OSError):
        return False
    return True
