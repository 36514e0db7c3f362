"""The GPU as a session needs it: memory, streams, graphs. The only importer of cuda-bindings.

Everything is a context manager, so that an `ExitStack` frees it in order, also after an error.
The session runs on device 0; ``CUDA_VISIBLE_DEVICES`` chooses which GPU that is.

No GPU has run this module yet: names, signatures and the errors of a machine without a GPU are
tested against the installed bindings, results are not.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hhdeploy.errors import DeviceError, require

_DEVICE = 0
_ELSEWHERE = "or open the session with `device='cpu'`"
_RESTART = "The process has lost its GPU context: restart it. nvidia-smi and dmesg may say why."
_HINTS = {
    "cudaErrorNoDevice": f"Check nvidia-smi and CUDA_VISIBLE_DEVICES, {_ELSEWHERE}.",
    "cudaErrorInsufficientDriver": (
        "The NVIDIA driver is missing, or too old for this CUDA runtime: install or update it "
        f"(nvidia-smi shows what is there), {_ELSEWHERE}."
    ),
    "cudaErrorMemoryAllocation": (
        "Open the session with fewer `slots` or `contexts`, build the engine with a smaller "
        "`batch[2]`, or stop other programs that use the GPU."
    ),
    "cudaErrorDevicesUnavailable": "Another process holds the GPU: nvidia-smi shows which.",
    **dict.fromkeys(
        ("cudaErrorStreamCaptureUnsupported", "cudaErrorStreamCaptureInvalidated"),
        "This engine cannot be recorded: open the session without `cuda_graphs`.",
    ),
    "cudaErrorSystemDriverMismatch": "Driver and kernel module differ: reboot after an update.",
    **dict.fromkeys(
        (
            "cudaErrorIllegalAddress",
            "cudaErrorLaunchFailure",
            "cudaErrorLaunchTimeout",
            "cudaErrorHardwareStackError",
            "cudaErrorIllegalInstruction",
            "cudaErrorMisalignedAddress",
            "cudaErrorInvalidAddressSpace",
            "cudaErrorInvalidPc",
            "cudaErrorAssert",
            "cudaErrorECCUncorrectable",
            "cudaErrorNvlinkUncorrectable",
            "cudaErrorContextIsDestroyed",
            "cudaErrorCudartUnloading",
        ),
        _RESTART,
    ),
}


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine: its name, and its architecture such as ``sm89``."""

    name: str
    architecture: str


def driver_library() -> str:
    """Name of the NVIDIA driver's own library, which needs no package."""
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def result_of(result: tuple[Any, ...]) -> Any:
    """The value of a call of cuda-bindings, which returns (status,) or (status, value).

    Raises:
        DeviceError: any status but success, with what CUDA says of it and what to do.
    """
    status, *values = result
    if status.name == "cudaSuccess":
        return values[0] if values else None
    text = _cudart().cudaGetErrorString(status)[1].decode()
    hint = _HINTS.get(status.name, "Look at the driver and the GPU with: hhdeploy doctor")
    raise DeviceError(f"CUDA: {text} ({status.name}, {int(status)}). {hint}")


def find_gpu() -> Gpu:
    """The GPU that sessions use.

    Raises:
        DeviceError: there is none, or its driver does not work.
        MissingDependencyError: cuda-bindings is not installed.
    """
    cudart = _cudart()
    result_of(cudart.cudaGetDeviceCount())
    use_gpu()
    properties = result_of(cudart.cudaGetDeviceProperties(_DEVICE))
    return Gpu(properties.name.decode(), f"sm{properties.major}{properties.minor}")


def use_gpu() -> None:
    """Select the session's GPU in this thread: the choice is each thread's own in CUDA."""
    result_of(_cudart().cudaSetDevice(_DEVICE))


@contextmanager
def device_memory(size: int) -> Iterator[int]:
    """The address of ``size`` bytes on the GPU, not cleared."""
    cudart = _cudart()
    address = int(result_of(cudart.cudaMalloc(size)))
    try:
        yield address
    finally:
        result_of(cudart.cudaFree(address))


@contextmanager
def pinned_array(shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """Zeros in page-locked memory, which the GPU copies from and to without a detour.

    The array must not be used after the block.
    """
    cudart = _cudart()
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    address = int(result_of(cudart.cudaMallocHost(size)))
    try:
        memory = memoryview((ctypes.c_char * size).from_address(address))
        array = np.frombuffer(memory, kind).reshape(shape)
        array[...] = 0
        yield array
    finally:
        result_of(cudart.cudaFreeHost(address))


class Stream:
    """A queue of work on the GPU; use `open_stream`.

    Attributes:
        handle: what TensorRT takes.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._cudart = _cudart()

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Queue a copy of a contiguous array to an address on the GPU."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        result_of(
            self._cudart.cudaMemcpyAsync(
                target, source.ctypes.data, source.nbytes, kind, self.handle
            )
        )

    def download(self, target: NDArray[Any], source: int) -> None:
        """Queue a copy from an address on the GPU that fills a contiguous array."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        result_of(
            self._cudart.cudaMemcpyAsync(
                target.ctypes.data, source, target.nbytes, kind, self.handle
            )
        )

    def synchronize(self) -> None:
        """Wait for all work; errors of what ran show here."""
        result_of(self._cudart.cudaStreamSynchronize(self.handle))

    @contextmanager
    def captured(self, work: Callable[[], None]) -> Iterator[Any]:
        """A graph of what ``work`` queues, which is recorded and not run; see `replay`."""
        cudart = self._cudart
        # Thread-local: the other threads of a server may allocate meanwhile.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        result_of(cudart.cudaStreamBeginCapture(self.handle, mode))
        try:
            work()
        except BaseException:
            # The stream is unusable until the capture has ended; its status is work's error again.
            cudart.cudaStreamEndCapture(self.handle)
            raise
        recorded = result_of(cudart.cudaStreamEndCapture(self.handle))
        try:
            graph = result_of(cudart.cudaGraphInstantiate(recorded, 0))
        finally:
            result_of(cudart.cudaGraphDestroy(recorded))
        try:
            yield graph
        finally:
            result_of(cudart.cudaGraphExecDestroy(graph))

    def replay(self, graph: Any) -> None:
        """Queue all that a graph recorded."""
        result_of(self._cudart.cudaGraphLaunch(graph, self.handle))


@contextmanager
def open_stream() -> Iterator[Stream]:
    """A stream that does not wait for CUDA's default stream, which other libraries use."""
    cudart = _cudart()
    handle = int(result_of(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)))
    try:
        yield Stream(handle)
    finally:
        result_of(cudart.cudaStreamDestroy(handle))


def _cudart() -> ModuleType:
    return require("cuda.bindings.runtime", "rtx", "a TensorRT session")
