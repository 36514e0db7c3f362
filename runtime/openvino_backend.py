"""OpenVINO behind the `Backend` protocol: the CPU runtime for graphs in float32."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import BundleError, require
from hhdeploy.runtime.backends import BackendOptions, Bank, Ids, Images


class OpenVinoBackend:
    """One compiled model; each thread has an infer request with the bank bound once."""

    def __init__(self, graph: Path, bank: Bank | None, options: BackendOptions) -> None:
        self._ov = require("openvino", "openvino", "device='openvino'")
        # OpenVINO's default is bfloat16 on some CPUs: the precision asked for is in the graph.
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if options.threads is not None:
            config["INFERENCE_NUM_THREADS"] = options.threads
        try:
            self._model: Any = self._ov.Core().compile_model(str(graph), "CPU", config)
        except RuntimeError as error:
            raise BundleError(f"OpenVINO cannot compile {graph}: {error}") from error
        self._bank = None if bank is None else self._ov.Tensor(bank, shared_memory=True)
        self._requests = threading.local()

    @property
    def name(self) -> str:
        """``openvino CPU``."""
        return "openvino CPU"

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`."""
        request = getattr(self._requests, "it", None)
        if request is None:
            request = self._model.create_infer_request()
            if self._bank is not None:
                request.set_tensor("adapter_bank", self._bank)
            self._requests.it = request
        request.set_tensor("images", self._ov.Tensor(images, shared_memory=True))
        if ids is not None:
            request.set_tensor("adapter_ids", self._ov.Tensor(ids, shared_memory=True))
        request.infer()
        logits: NDArray[np.float32] = request.get_tensor("logits").data.copy()
        return logits

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: the bank is shared memory."""

    def close(self) -> None:
        """See `Backend.close`."""
        self._requests = threading.local()
        self._model = None
