"""ONNX Runtime behind the `Backend` protocol, on the CPU and on NVIDIA GPUs.

No GPU has run the GPU half yet; its binding of inputs and of the bank is tested on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import (
    BundleError,
    DeviceError,
    MissingDependencyError,
    SessionError,
    require,
)
from hhdeploy.runtime.backends import Backend, BackendOptions, Bank, Ids, Images
from hhdeploy.runtime.cuda import driver_library

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
# CUDA's float32 products would be rounded to TensorFloat-32, which is another precision.
_PROVIDER_OPTIONS = {"cuda": {"use_tf32": "0"}}
# Where a GPU's bank is allocated, in ONNX Runtime's words.
_GPU_MEMORY = "cuda"
# What must not be left to the CPU; see `_check_placement`.
_PRODUCTS = ("Conv", "Gemm", "MatMul")


def open_onnxruntime(
    graph: Path, bank: Bank | None, device: str, options: BackendOptions
) -> Backend:
    """Load a graph into ONNX Runtime.

    Raises:
        SessionError: this build or this machine lacks the device's execution provider; nothing
            is left to another one in silence.
        BundleError: a graph that does not load. DeviceError: the GPU refused.
    """
    ort = require("onnxruntime", "cpu" if device == "cpu" else "gpu", f"device={device!r}")
    session = _open_session(ort, graph, device, options)
    if device == "cpu":
        return OnnxRuntimeBackend(session, bank)
    return OnnxRuntimeGpuBackend(ort, session, bank)


def _open_session(ort: ModuleType, graph: Path, device: str, options: BackendOptions) -> Any:
    provider, there = _PROVIDERS[device], ort.get_available_providers()
    if provider not in there:
        raise SessionError(
            f"device={device!r} needs ONNX Runtime's {provider}, this build has "
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
    if device == "cpu":
        # Processors without VNNI add pairs of 8-bit products in 16 bits, which overflows in silence
        # (8x the error of INT8 itself on such a machine). This takes other kernels there; where
        # there is VNNI it changes nothing.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    if device == "cuda":
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if device != "cpu":
        # CUDA's libraries out of their pip packages; it prints what it does not find.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    try:
        session = ort.InferenceSession(
            str(graph),
            settings,
            providers=[(provider, _PROVIDER_OPTIONS.get(device, {}))],
            enable_fallback=0,  # else a failing GPU is replaced by the CPU, and a line printed
        )
    except Exception as error:
        failure = BundleError if device == "cpu" else DeviceError
        raise failure(f"ONNX Runtime cannot load {graph} with {provider}: {error}") from error
    if session.get_providers()[0] != provider:
        raise SessionError(
            f"ONNX Runtime could not start {provider} on this machine and would have used "
            f"{session.get_providers()[0]}. Check the driver with: hhdeploy doctor"
        )
    if device == "cuda":
        _check_placement(session)
    return session


def _check_placement(session: Any) -> None:
    """No matrix product is left to the CPU, e.g. for a type that the GPU's kernels lack."""
    # Older versions of ONNX Runtime do not tell.
    tell: Callable[[], Any] = getattr(session, "get_provider_graph_assignment_info", tuple)
    left = [
        node.op_type
        for part in tell()
        if part.ep_name == _PROVIDERS["cpu"]
        for node in part.get_nodes()
        if any(name in node.op_type for name in _PRODUCTS)
    ]
    if left:
        raise DeviceError(
            f"{_PROVIDERS['cuda']} leaves {len(left)} of the graph's products to the CPU "
            f"({', '.join(sorted(set(left)))}). Use another precision, or device='cpu'."
        )


class OnnxRuntimeBackend:
    """One InferenceSession on the CPU; the bank is handed over by reference, never copied."""

    def __init__(self, session: Any, bank: Bank | None) -> None:
        self._session = session
        self._bank = bank
        self.name = f"onnxruntime {session.get_providers()[0]}"

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`. Raises `DeviceError` if ONNX Runtime fails, e.g. out of memory."""
        feeds: dict[str, NDArray[Any]] = {"images": images}
        if ids is not None:
            feeds["adapter_ids"] = ids
        if self._bank is not None:
            feeds["adapter_bank"] = self._bank
        try:
            logits: NDArray[np.float32] = self._session.run(["logits"], feeds)[0]
        except Exception as error:  # its exceptions have no base of their own
            raise DeviceError(f"{self.name} failed: {error}") from error
        return logits

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: the next run reads the bank as it is."""

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None


class OnnxRuntimeGpuBackend:
    """One InferenceSession on a GPU; the bank stays there, bound to every run."""

    def __init__(self, ort: ModuleType, session: Any, bank: Bank | None) -> None:
        self._session = session
        self._bank = bank
        self._bound: Any = None
        if bank is not None:
            make = ort.OrtValue.ortvalue_from_shape_and_type
            try:
                self._bound = make(bank.shape, bank.dtype, _GPU_MEMORY, 0)
                self._bound.update_inplace(bank)
            except Exception as error:
                raise DeviceError(
                    f"ONNX Runtime cannot put a bank of {bank.nbytes / 1e6:.0f} MB on the GPU: "
                    f"{error}. Open the session with fewer slots."
                ) from error
        self.name = f"onnxruntime {session.get_providers()[0]}"

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`."""
        binding = self._session.io_binding()
        try:
            binding.bind_cpu_input("images", images)
            if ids is not None:
                binding.bind_cpu_input("adapter_ids", ids)
            if self._bound is not None:
                binding.bind_ortvalue_input("adapter_bank", self._bound)
            binding.bind_output("logits")
            self._session.run_with_iobinding(binding)
            logits: NDArray[np.float32] = binding.copy_outputs_to_cpu()[0]
        except Exception as error:
            raise DeviceError(f"{self.name} failed: {error}") from error
        return logits

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: copies the whole bank, ONNX Runtime copies no part.

        The other rows, which requests may be reading, are overwritten with what they hold.
        """
        if self._bound is not None:
            self._bound.update_inplace(self._bank)

    def close(self) -> None:
        """See `Backend.close`."""
        self._bound = None
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
