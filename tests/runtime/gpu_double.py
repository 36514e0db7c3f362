"""Stand-ins for CUDA's runtime and TensorRT on a machine without a GPU: plumbing, no results.

"GPU memory" is host memory, "engines" are ONNX graphs that ONNX Runtime computes. What this
shows is that addresses, shapes, pieces, padding, rows and lifetimes are right; what a GPU
computes it cannot show. Misuse that CUDA would answer with undefined behaviour raises here.
"""

# ruff: noqa: N802, N803, N815  (the names are CUDA's and TensorRT's)

from __future__ import annotations

import ctypes
import weakref
from dataclasses import replace
from enum import Enum, IntEnum
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime as ort

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import EngineEntry, write_manifest
from hhdeploy.files.writing import sha256_of

BATCH, SLOTS = (2, 4, 5), (2, 8, 16)


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class Cudart(ModuleType):
    """The part of ``cuda.bindings.runtime`` that hhdeploy calls."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self, memory=1 << 30):
        super().__init__("cuda.bindings.runtime")
        self.left = memory
        self.live = {}  # address -> buffer, of device and pinned memory
        self.streams = {}  # handle -> work that waits for `cudaStreamSynchronize`
        self.recording = {}  # handle -> work that is being recorded
        self.graphs = set()
        self.lent = weakref.WeakValueDictionary()  # address -> the context that works in it
        self.copied = []  # bytes of every upload
        self.replays = 0

    @property
    def clean(self):
        return not (self.live or self.streams or self.recording or self.graphs)

    def holds(self, address, size):
        assert any(
            start <= address and address + size <= start + len(buffer)
            for start, buffer in self.live.items()
        ), "outside of allocated memory"

    def do(self, stream, work):
        self.recording.get(stream, self.streams[stream]).append(work)

    def cudaGetDeviceCount(self):
        return Status.cudaSuccess, 1

    def cudaSetDevice(self, device):
        assert device == 0
        return (Status.cudaSuccess,)

    def cudaGetDeviceProperties(self, device):
        return Status.cudaSuccess, SimpleNamespace(name=b"Stand-in GPU", major=8, minor=9)

    def cudaGetErrorString(self, error):
        return Status.cudaSuccess, b"out of memory"

    def cudaMalloc(self, size):
        if size > self.left:
            return Status.cudaErrorMemoryAllocation, None
        buffer = (ctypes.c_char * size)()
        ctypes.memset(buffer, 0xFF, size)  # NaN: what is not written shows
        self.live[ctypes.addressof(buffer)] = buffer
        return Status.cudaSuccess, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, devPtr):
        assert devPtr not in self.lent, "freed under a context"
        del self.live[devPtr]
        return (Status.cudaSuccess,)

    def cudaFreeHost(self, ptr):
        return self.cudaFree(ptr)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        up = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.holds(dst if up else src, count)
        if up:
            self.copied.append(count)
        self.do(stream, lambda: ctypes.memmove(dst, src, count))
        return (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        handle = 1 + max(self.streams, default=0)
        self.streams[handle] = []
        return Status.cudaSuccess, handle

    def cudaStreamDestroy(self, stream):
        del self.streams[stream]
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        assert stream not in self.recording, "synchronised while recording"
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert not self.streams[stream], "recording while the stream is busy"
        self.recording[stream] = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        return Status.cudaSuccess, tuple(self.recording.pop(stream))

    def cudaGraphInstantiate(self, graph, flags):
        self.graphs.add(graph)
        return Status.cudaSuccess, graph

    def cudaGraphDestroy(self, graph):
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec):
        self.graphs.remove(graphExec)
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec, stream):
        self.replays += 1
        self.streams[stream] += graphExec
        return (Status.cudaSuccess,)


class Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class Kernels:
    """An IRuntimeCache that accepts what `serialize` gave."""

    def __init__(self, log):
        self.log, self.loaded = log, None

    def deserialize(self, blob):
        self.loaded = bytes(blob)
        return True

    def serialize(self):
        return memoryview(b"kernels")


class Context:
    def __init__(self, engine, own_memory):
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.memory, self.profile, self.recorded = own_memory, None, False

    def set_device_memory(self, memory, size):
        self.engine.cudart.holds(memory, size)
        self.engine.cudart.lent[memory] = self
        self.memory = True

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self.profile = profile_index
        return True

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def set_input_shape(self, name, shape):
        assert not self.recorded, "a context was changed after a graph was recorded from it"
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        return self.shapes["images"][0], self.engine.outputs["logits"][1]

    def execute_async_v3(self, stream_handle):
        assert self.memory and self.profile == 0
        if self.engine.fails:
            self.engine.log.log(self.engine.severity, "the stand-in was told to fail")
            return False
        self.recorded |= stream_handle in self.engine.cudart.recording
        shapes = dict(self.shapes)
        self.engine.cudart.do(stream_handle, lambda: self.compute(shapes))
        return True

    def compute(self, shapes):
        feeds = {name: self.tensor(name, shapes[name]) for name in self.engine.inputs}
        (logits,) = self.engine.session.run(["logits"], feeds)
        self.engine.batches.append(len(logits))
        self.tensor("logits", logits.shape)[...] = logits

    def tensor(self, name, shape):
        dtype = np.dtype(np.int64 if name == "adapter_ids" else np.float32)
        size = int(np.prod(shape)) * dtype.itemsize
        self.engine.cudart.holds(self.addresses[name], size)
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class EngineDouble:
    """An ICudaEngine that is an ONNX graph."""

    device_memory_size_v2 = 64

    def __init__(self, trt, graph, log):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.trt, self.cudart, self.log = trt, trt.cudart, log
        self.severity = trt.ILogger.ERROR
        self.inputs = {t.name: tuple(t.shape) for t in self.session.get_inputs()}
        self.outputs = {t.name: tuple(t.shape) for t in self.session.get_outputs()}
        self.contexts, self.batches, self.fails = weakref.WeakSet(), [], False

    @property
    def num_io_tensors(self):
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name):
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.trt.dtypes.get(name, "FLOAT"))

    def get_tensor_shape(self, name):
        shape = {**self.inputs, **self.outputs}[name]
        return [d if isinstance(d, int) else -1 for d in shape]

    def create_runtime_config(self):
        config = SimpleNamespace(cuda_graph_strategy=None, cache=None)
        config.create_runtime_cache = lambda: Kernels(self.log)
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        self.trt.configs.append(config)
        return config

    def create_execution_context(self, how=None):
        context = Context(self, own_memory=how != "USER_MANAGED")
        self.contexts.add(context)
        return context


class TensorRt(ModuleType):
    """The part of ``tensorrt`` and ``tensorrt_rtx`` that hhdeploy calls."""

    TensorIOMode = Mode
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self, name, cudart, version="99.1"):
        super().__init__(name)
        self.__version__ = version
        self.cudart = cudart
        self.dtypes = {"adapter_ids": "INT64"}
        self.engines, self.configs = [], []

    def Runtime(self, logger):
        def deserialize_cuda_engine(plan):
            if plan == b"not an engine":
                logger.log(self.ILogger.ERROR, "magic tag does not match")
                return None
            self.engines.append(EngineDouble(self, plan.decode(), logger))
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)


def add_engine(path, plan, **changes):
    """Enter a file as an engine of a bundle; the stand-ins take a graph's path as ``plan``."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    backend = changes.get("backend", "tensorrt")
    file = changes.pop("file", f"model.float32.{backend}.engine")
    entry = EngineEntry(
        **{
            "file": file,
            "backend": backend,
            "version": "99.1",
            "precision": "float32",
            "architectures": ("sm89",),
            "gpu": None,
            "batch": BATCH,
            "slots": SLOTS if manifest.layout and not manifest.bank_as_constant else None,
            "bank_sha256": None,
            "graph_sha256": manifest.graph_digest("float32"),
            "optimization_level": None,
            "build_seconds": 1.0,
            "bytes": len(plan),
            **changes,
        }
    )
    (path / file).write_bytes(plan)
    files = {**manifest.files, file: sha256_of(path / file)}
    engines = (*manifest.engines, entry)
    write_manifest(path, replace(manifest, engines=engines, files=files))
    return entry
