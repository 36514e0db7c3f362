"""ONNX Runtime behind the `Backend` protocol."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import BundleError, SessionError, require
from hhdeploy.runtime.backends import BackendOptions, Bank, Ids, Images

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """One InferenceSession; the bank is handed over by reference, never copied on the CPU."""

    def __init__(
        self, graph: Path, bank: Bank | None, device: str, options: BackendOptions
    ) -> None:
        ort = require("onnxruntime", "gpu" if device == "cuda" else "cpu", f"device={device!r}")
        provider = _PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise SessionError(
                f"device={device!r} needs ONNX Runtime's {provider}, this build has "
                f"{', '.join(ort.get_available_providers())}. Install it with: pip uninstall "
                "onnxruntime && pip install 'hhdeploy[gpu]'"
            )
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        try:
            self._session: Any = ort.InferenceSession(str(graph), settings, providers=[provider])
        except Exception as error:
            raise BundleError(f"ONNX Runtime cannot load {graph}: {error}") from error
        if self._session.get_providers()[0] != provider:
            raise SessionError(
                f"ONNX Runtime could not start {provider} on this machine and would have used "
                f"{self._session.get_providers()[0]}. Check the driver with: hhdeploy doctor"
            )
        self._provider = provider
        self._bank = bank

    @property
    def name(self) -> str:
        """``onnxruntime`` and its execution provider."""
        return f"onnxruntime {self._provider}"

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`."""
        feeds: dict[str, NDArray[Any]] = {"images": images}
        if ids is not None:
            feeds["adapter_ids"] = ids
        if self._bank is not None:
            feeds["adapter_bank"] = self._bank
        logits: NDArray[np.float32] = self._session.run(["logits"], feeds)[0]
        return logits

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None


def cuda_available() -> bool:
    """True if ONNX Runtime was built for CUDA and the machine has the driver."""
    try:
        ort = require("onnxruntime", "cpu", "a session")
        if _PROVIDERS["cuda"] not in ort.get_available_providers():
            return False
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
