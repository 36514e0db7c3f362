"""ONNX Runtime on an NVIDIA GPU: CUDA's libraries, the bank in its memory, CUDA graphs.

No GPU has run this module yet; with the CPU's memory in the GPU's place all of it is tested.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hhdeploy.errors import DeviceError
from hhdeploy.runtime.backends import Bank, Ids, Images, closed

# Where tensors on the GPU are allocated, in ONNX Runtime's words.
MEMORY = "cuda"
# What CUDA's provider is linked with; each after those that it is linked with itself.
_LIBRARIES = "libcudart libcublasLt libcublas libnvrtc libcurand libcufft libcudnn".split()


def preload_libraries(ort: ModuleType) -> None:
    """Load CUDA and cuDNN out of their pip packages, wherever those are; PyTorch brings them.

    ONNX Runtime looks for the packages beside itself only, and so misses them when it lies in
    another directory of the path. What is loaded it finds by name; what it misses it prints, here
    to stderr.
    """
    wanted = getattr(ort, "cuda_version", "")  # "": built without CUDA
    if wanted and "torch" not in sys.modules:  # torch has loaded them; never twice
        for file in _packaged_libraries():
            with contextlib.suppress(OSError):  # then it is among those that are missed
                ctypes.CDLL(str(file))
    with contextlib.redirect_stdout(sys.stderr):
        ort.preload_dlls()


def _packaged_libraries() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")  # a namespace of many packages: imports nothing
    roots = spec.submodule_search_locations if spec is not None else None
    for name in _LIBRARIES:
        for root in roots or ():
            yield from sorted(Path(root).glob(f"*/lib/{name}.so.*"))


class OnnxRuntimeGpuBackend:
    """One InferenceSession on a GPU; the bank stays there, bound to every run."""

    def __init__(self, ort: ModuleType, session: Any, bank: Bank | None, name: str) -> None:
        self._session = session
        self._bank = bank
        self._bound = None if bank is None else _bank_on_gpu(ort, bank)
        self.name = name

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`."""
        bound, session = self._bound, self._session  # in this order: `close` frees the bank last
        if session is None:
            raise closed()
        binding = session.io_binding()
        try:
            binding.bind_cpu_input("images", images)
            if ids is not None:
                binding.bind_cpu_input("adapter_ids", ids)
            if bound is not None:
                binding.bind_ortvalue_input("adapter_bank", bound)
            binding.bind_output("logits")
            session.run_with_iobinding(binding)
            logits: NDArray[np.float32] = binding.copy_outputs_to_cpu()[0]
        except Exception as error:
            raise DeviceError(f"{self.name} failed: {error}") from error
        return logits

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: copies the whole bank, ONNX Runtime copies no part.

        The other rows, which requests may be reading, are overwritten with what they hold.
        """
        if self._bound is not None:
            _copy_bank(self._bound, self._bank, self.name)

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None
        self._bound = None


class OnnxRuntimeGraphBackend:
    """One InferenceSession on a GPU that records a CUDA graph of each batch size and replays it.

    A graph reads and writes the same memory in every run, so each size has inputs and outputs of
    its own on the GPU, which stay until the session is closed: meant for few sizes. ONNX Runtime
    lets one thread alone use such a session, so all its work, copies of the bank included, is done
    by a thread of its own, in turn. Other sessions of the process must not work while a size runs
    for the first time: CUDA refuses to record then.
    """

    def __init__(self, ort: ModuleType, session: Any, bank: Bank | None, name: str) -> None:
        self._ort = ort
        self._session = session
        self._bank = bank
        self._sizes: dict[int, _Recorded] = {}
        self.name = name
        self._thread = ThreadPoolExecutor(1, "hhdeploy-cuda-graphs")
        try:
            self._bound = (
                None if bank is None else self._thread.submit(_bank_on_gpu, ort, bank).result()
            )
        except BaseException:
            self._thread.shutdown()
            raise

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`. The first run of a batch size records it, and is slow."""
        try:
            running = self._thread.submit(self._run, images, ids)
        except RuntimeError:
            raise closed() from None
        return running.result()

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: copies the whole bank, between two runs."""
        if self._bound is None:
            return
        try:
            copied = self._thread.submit(_copy_bank, self._bound, self._bank, self.name)
        except RuntimeError:
            return  # closed: nobody reads the bank any more
        copied.result()

    def close(self) -> None:
        """See `Backend.close`: waits for the run that is under way."""
        self._thread.shutdown()
        self._sizes.clear()
        self._bound = None
        self._session = None

    def _run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        feeds: dict[str, NDArray[Any]] = {"images": images}
        if ids is not None:
            feeds["adapter_ids"] = ids
        try:
            recorded = self._sizes.get(len(images))
            if recorded is None:
                recorded = _Recorded(self._ort, self._session, feeds, self._bound)
            logits = recorded.run(feeds)
        except Exception as error:
            raise DeviceError(
                f"{self.name} failed with CUDA graphs: {error}. Without them: open the session "
                "without `cuda_graphs`."
            ) from error
        self._sizes[len(images)] = recorded
        return logits


class _Recorded:
    """Tensors on the GPU for one batch size, and the graph that ONNX Runtime keeps for them."""

    def __init__(
        self, ort: ModuleType, session: Any, feeds: dict[str, NDArray[Any]], bank: Any
    ) -> None:
        size = len(feeds["images"])
        (output,) = session.get_outputs()
        self._session = session
        self._inputs = {
            name: _on_gpu(ort, array.shape, array.dtype) for name, array in feeds.items()
        }
        self._logits = _on_gpu(ort, (size, *output.shape[1:]), np.float32)
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        if bank is not None:
            self._binding.bind_ortvalue_input("adapter_bank", bank)
        self._binding.bind_ortvalue_output("logits", self._logits)
        self._options = ort.RunOptions()
        # Without a number of its own, ONNX Runtime would replay the first size's graph.
        self._options.add_run_config_entry("gpu_graph_id", str(size))

    def run(self, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The first call records, later ones replay."""
        for name, value in self._inputs.items():
            value.update_inplace(feeds[name])
        self._session.run_with_iobinding(self._binding, self._options)
        # A copy: in the CPU's memory the array would be the tensor itself.
        logits: NDArray[np.float32] = self._logits.numpy().copy()
        return logits


def _on_gpu(ort: ModuleType, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """A tensor that is not filled yet."""
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, MEMORY, 0)


def _bank_on_gpu(ort: ModuleType, bank: Bank) -> Any:
    try:
        bound = _on_gpu(ort, bank.shape, bank.dtype)
        bound.update_inplace(bank)
    except Exception as error:
        raise DeviceError(
            f"ONNX Runtime cannot put a bank of {bank.nbytes / 1e6:.0f} MB on the GPU: "
            f"{error}. Open the session with fewer `slots`."
        ) from error
    return bound


def _copy_bank(bound: Any, bank: Bank | None, name: str) -> None:
    try:
        bound.update_inplace(bank)
    except Exception as error:
        raise DeviceError(f"{name} cannot write a row of the bank: {error}") from error
