"""TensorRT and TensorRT-RTX engines behind the `Backend` protocol, written once for both.

The bank is uploaded once and shared. A run takes a free lane (see `tensorrt_lane`), or waits
for one; batches larger than the engine's run in pieces, smaller ones are padded.

No GPU has run this module yet. What needs none is tested: which engine is loaded, the tensors
it must have, how batches are cut and padded, and every name and signature of the bindings.
"""

from __future__ import annotations

import queue
import threading
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.engines import check_slots, choose_engine, split_batch
from hhdeploy.bundle.manifest import EngineEntry, Manifest
from hhdeploy.choices import Precision, TensorRt
from hhdeploy.errors import BundleError, as_code
from hhdeploy.packages import import_tensorrt
from hhdeploy.runtime import cuda
from hhdeploy.runtime.backends import BackendOptions, Bank, Ids, Images, closed
from hhdeploy.runtime.kernel_cache import kernels_entry
from hhdeploy.runtime.tensorrt_engine import EngineTensor, open_engine
from hhdeploy.runtime.tensorrt_lane import DeviceBank, Lane, open_lane


def find_engine(manifest: Manifest, backend: TensorRt, precision: Precision) -> EngineEntry:
    """The engine of a bundle that this machine's TensorRT and GPU can run.

    Raises:
        DeviceError: no GPU.
        BundleError: no engine fits, see `choose_engine`.
        MissingDependencyError: the backend or cuda-bindings is not installed.
    """
    version = import_tensorrt(backend).__version__
    architecture = cuda.find_gpu().architecture
    return choose_engine(manifest, backend, precision, version=version, architecture=architecture)


def expected_tensors(manifest: Manifest, engine: EngineEntry) -> list[EngineTensor]:
    """Inputs and outputs of the graph contract, as this engine must have them."""
    tensors = [EngineTensor("images", True, "FLOAT", (-1, *manifest.input_size))]
    if manifest.layout is not None:
        tensors.append(EngineTensor("adapter_ids", True, "INT64", (-1,)))
        if engine.slots is not None:
            tensors.append(EngineTensor("adapter_bank", True, "FLOAT", (-1, manifest.layout.size)))
    return [*tensors, EngineTensor("logits", False, "FLOAT", (-1, manifest.classes))]


def check_tensors(found: list[EngineTensor], manifest: Manifest, engine: EngineEntry) -> None:
    """The engine has the bundle's inputs and outputs; batch and slots may be fixed in it.

    Raises:
        BundleError: a tensor that is missing, unknown, or of another type or shape.
    """
    expected = {t.name: t for t in expected_tensors(manifest, engine)}
    if {t.name for t in found} == set(expected) and all(_fits(t, expected[t.name]) for t in found):
        return
    raise BundleError(
        f"{engine.file} is not an engine of this bundle. Expected: "
        f"{'; '.join(map(str, expected.values()))}. Found: {'; '.join(map(str, found))}. "
        f"Build it again with: {as_code('build', 'BUNDLE', backend=engine.backend)}"
    )


def _fits(found: EngineTensor, expected: EngineTensor) -> bool:
    return (
        (found.is_input, found.dtype) == (expected.is_input, expected.dtype)
        and len(found.shape) == len(expected.shape)
        and all(e in (-1, f) for f, e in zip(found.shape, expected.shape, strict=True))
    )


class TensorRtBackend:
    """One engine on one GPU."""

    def __init__(
        self, bundle: Bundle, bank: Bank | None, engine: EngineEntry, options: BackendOptions
    ) -> None:
        """Load an engine that `find_engine` chose; ``bank`` is None if it is in the engine.

        Raises:
            SessionError: more or fewer slots than the engine takes.
            BundleError: the file is missing or was changed, or is not this bundle's engine.
            DeviceError: no GPU, or not enough of its memory.
        """
        gpu = cuda.find_gpu()
        if bank is not None:
            check_slots(len(bank), engine.slots)
        plan = bundle.read(engine.file)
        self.name = f"{engine.backend} {engine.version} {gpu.name}"
        self._batch = engine.batch
        self._bank = bank
        # The newest free lane first: its CUDA graphs are recorded.
        self._free: queue.LifoQueue[Lane | None] = queue.LifoQueue()
        self._lanes = options.contexts
        self._bank_lock = threading.Lock()
        kept = None
        if options.cache is not None and engine.backend == "tensorrt-rtx":
            digest = bundle.manifest.files[engine.file]
            kept = kernels_entry(options.cache, digest, engine.version, gpu.name)
        with ExitStack() as stack:
            loaded = stack.enter_context(
                open_engine(plan, engine, kept, cuda_graphs=options.cuda_graphs)
            )
            check_tensors(loaded.tensors, bundle.manifest, engine)
            self._stream = stack.enter_context(cuda.open_stream())
            shared = None
            if bank is not None:
                self._address = stack.enter_context(cuda.device_memory(bank.nbytes))
                self._stream.upload(self._address, bank)
                self._stream.synchronize()
                shared = DeviceBank(self._address, bank.shape)
            for _ in range(options.contexts):
                lane = open_lane(loaded, shared, engine.batch, cuda_graphs=options.cuda_graphs)
                self._free.put(stack.enter_context(lane))
            self._resources = stack.pop_all()

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """See `Backend.run`."""
        lane = self._free.get()
        try:
            if lane is None:
                raise closed()
            cuda.use_gpu()
            pieces = [
                lane.run(images[start:stop], None if ids is None else ids[start:stop], size)
                for start, stop, size in split_batch(len(images), self._batch)
            ]
        finally:
            self._free.put(lane)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def row_changed(self, row: int) -> None:
        """See `Backend.row_changed`: copies that row, the others are in use meanwhile."""
        with self._bank_lock:
            if self._bank is None:  # in the engine, or freed: the last lease may outlive close
                return
            cuda.use_gpu()
            values = self._bank[row]
            self._stream.upload(self._address + row * values.nbytes, values)
            self._stream.synchronize()

    def close(self) -> None:
        """See `Backend.close`; waits for the runs in flight."""
        for _ in range(self._lanes):
            self._free.get()
        self._free.put(None)
        with self._bank_lock:
            self._bank = None
        cuda.use_gpu()
        self._resources.close()
