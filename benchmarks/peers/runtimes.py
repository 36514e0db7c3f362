"""One merged model a task in ONNX Runtime and OpenVINO, and ONNX Runtime's ``.onnx_adapter``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import THREADS
from benchmarks.peers.tasks import CLASSES, SCALE, Array, Case, by_task
from hhdeploy.runtime.openvino_backend import shared_core


def lora_tensors(case: Case, name: str) -> dict[str, Array]:
    """A PEFT adapter as [in, r] and [r, out] a site, the scale in B, and its head."""
    from safetensors.numpy import load_file

    found: dict[str, Array] = {}
    prefix = "base_model.model."
    for key, value in load_file(case.peft(name) / "adapter_model.safetensors").items():
        place = key.removeprefix(prefix)
        if place.startswith("head."):
            found[place] = value
        elif place.endswith(".lora_A.weight"):
            found[f"{place.removesuffix('.lora_A.weight')}.A"] = value.T
        else:
            found[f"{place.removesuffix('.lora_B.weight')}.B"] = SCALE * value.T
    return found


def merged_graph(case: Case, name: str) -> bytes:
    """The task's own model, ONNX: the bare one's bytes with changed weights in their places."""
    content = bytearray(case.graph.read_bytes())
    adapter = lora_tensors(case, name)
    for site, start in case.offsets().items():
        if site.startswith("head."):
            changed = adapter[site]
        else:
            a, b = adapter[f"{site}.A"], adapter[f"{site}.B"]
            shape = (a.shape[0], b.shape[1])
            bare = np.frombuffer(content, np.float32, a.shape[0] * b.shape[1], start)
            changed = bare.reshape(shape) + a @ b
        data = np.ascontiguousarray(changed, np.float32).tobytes()
        content[start : start + len(data)] = data
    return bytes(content)


def ort_session(model: bytes | str) -> Any:
    """A session as ONNX Runtime's documentation opens it, on the threads of all."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3  # else a line for every input that has a default
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class _PerTask(ABC):
    """One merged model a task: the images of a task are one run."""

    promised = "float32"

    def __init__(self, case: Case) -> None:
        self._case = case
        self._models: dict[str, Any] = {}

    def close(self) -> None:
        """Let go of all models."""
        self._models.clear()

    @abstractmethod
    def _answer(self, name: str, images: Array) -> Array:
        """Of one task."""

    def run(self, images: Array, names: Sequence[str]) -> Array:
        """Logits of a batch."""
        found = np.empty((len(images), CLASSES), np.float32)
        for name, rows in by_task(names):
            found[rows] = self._answer(name, images[rows])
        return found


class OrtPerTask(_PerTask):
    """A session of ONNX Runtime a task."""

    def add(self, name: str) -> None:
        """Merge and open."""
        self._models[name] = ort_session(merged_graph(self._case, name))

    def _answer(self, name: str, images: Array) -> Array:
        (found,) = self._models[name].run(None, {"images": images})
        return found  # type: ignore[no-any-return]


class OpenVinoPerTask(_PerTask):
    """A compiled model of OpenVINO a task."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._core = shared_core()

    def add(self, name: str) -> None:
        """Merge and compile."""
        model = self._core.read_model(merged_graph(self._case, name), b"")
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": THREADS,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._models[name] = self._core.compile_model(model, "CPU", options).create_infer_request()

    def _answer(self, name: str, images: Array) -> Array:
        found: Array = next(iter(self._models[name].infer({"images": images}).values())).copy()
        return found


class OrtAdapters(_PerTask):
    """One session whose LoRA tensors are inputs; ``.onnx_adapter`` files, one adapter a run."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._session = ort_session(str(case.graph_with_inputs))

    def add(self, name: str) -> None:
        """Read the file."""
        import onnxruntime

        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(self._case.onnx_adapter(name)))
        self._models[name] = adapter

    def switch(self, name: str) -> Any:
        """Options of a run with this adapter."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_active_adapter(self._models[name])
        return options

    def _answer(self, name: str, images: Array) -> Array:
        (found,) = self._session.run(None, {"images": images}, self.switch(name))
        return found  # type: ignore[no-any-return]
