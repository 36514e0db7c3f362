"""What `hhdeploy doctor` tries in a process of its own: driver, cuda-bindings, TensorRT.

``python -m hhdeploy.doctor.probes NAME`` prints one finding as JSON; a library that crashes takes
only that process with it. Nothing here is needed to be there.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hhdeploy.choices import TensorRt
from hhdeploy.errors import EngineError, MissingDependencyError, WriteError, require
from hhdeploy.exporters.engine import BuildOptions, engine_from_onnx
from hhdeploy.files.writing import temporary_directory
from hhdeploy.packages import Log, import_tensorrt
from hhdeploy.runtime.cuda import Gpu, driver_library

ProbeState = Literal["ok", "absent", "problem"]

# y = -x, as onnx.helper serialises it: the smallest graph, for machines without onnx.
NEGATION = (
    b'\x08\n:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n'
    b"\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14"
)
# Of the CUDA driver API.
_NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76
# Newer than sm80, so people expect it to be covered.
_HOPPER = "sm90"


@dataclass(frozen=True)
class Probed:
    """How one thing stands, and what that means."""

    state: ProbeState
    detail: str


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        state: ``absent`` without a driver or without a GPU; ``problem`` if it does not work.
        detail: in words.
        cuda: the newest CUDA it can run, (major, minor); None without a driver.
        gpus: those that this process may use.
    """

    state: ProbeState
    detail: str
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()


def find_driver() -> Driver:
    """Ask the driver's own library: needs no package, and no CUDA toolkit."""
    name = driver_library()
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return Driver("absent", f"no NVIDIA driver ({name} is not there)")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    newest = (version.value // 1000, version.value % 1000 // 10)
    title = f"driver for CUDA {newest[0]}.{newest[1]}"
    status = cuda.cuInit(0)
    if status == _NO_DEVICE:
        return Driver("absent", f"{title}, but no GPU (CUDA_VISIBLE_DEVICES hides them?)", newest)
    if status:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        said = (text.value or b"unknown error").decode()
        return Driver("problem", f"{title} does not start: {said} ({status})", newest)
    gpus = _gpus(cuda)
    listed = "; ".join(f"{gpu.name}, {gpu.architecture}" for gpu in gpus)
    return Driver("ok", f"{title}: {listed}", newest, gpus)


def _gpus(cuda: Any) -> tuple[Gpu, ...]:
    count, number = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for index in range(count.value):
        cuda.cuDeviceGet(ctypes.byref(number), index)
        name = ctypes.create_string_buffer(256)
        cuda.cuDeviceGetName(name, len(name), number)
        parts = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, number)
            parts.append(str(value.value))
        found.append(Gpu(name.value.decode(), f"sm{''.join(parts)}"))
    return tuple(found)


def probe_driver() -> Probed:
    """Driver and GPUs."""
    driver = find_driver()
    return Probed(driver.state, driver.detail)


def probe_bindings() -> Probed:
    """cuda-bindings, which TensorRT sessions use, and whether the driver is new enough for it."""
    try:
        version = importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return Probed(
            "absent",
            "not installed, TensorRT sessions need it: pip install 'hhdeploy[rtx]' or "
            "'hhdeploy[tensorrt]'",
        )
    try:
        require("cuda.bindings.runtime", "rtx", "a TensorRT session")
    except MissingDependencyError as error:
        return Probed("problem", str(error))
    major = int(version.partition(".")[0])
    if old := _too_old(find_driver(), major):
        return Probed("problem", f"{version}: {old} or: pip install 'cuda-bindings<{major}'")
    return Probed("ok", version)


def probe_tensorrt(backend: TensorRt) -> Probed:
    """One backend: import it, build a network of one node, and load that where a GPU is."""
    module = backend.replace("-", "_")
    extra = "rtx" if backend == "tensorrt-rtx" else "tensorrt"
    if importlib.util.find_spec(module) is None:
        return Probed("absent", f"not installed: pip install 'hhdeploy[{extra}]'")
    try:
        trt = import_tensorrt(backend)
    except MissingDependencyError as error:
        return Probed("problem", str(error))
    driver = find_driver()
    major = _cuda_major(module)
    title = trt.__version__ + (f" for CUDA {major}" if major else "")
    if major and (old := _too_old(driver, major)):
        return Probed("problem", f"{title}: {old}")
    if backend == "tensorrt" and not driver.gpus:
        return Probed("absent", f"{title}: builds and runs on a GPU only; {driver.detail}")
    try:
        with temporary_directory("probe") as folder:
            graph = folder / "negation.onnx"
            graph.write_bytes(NEGATION)
            built = engine_from_onnx(graph, backend, {"x": (1,)}, BuildOptions())
    except (EngineError, WriteError) as error:
        return Probed("problem", f"{title}: {error}")
    covered = _architectures(trt) if backend == "tensorrt-rtx" else []
    where = f" for {', '.join(covered)}, or portable from sm80 on" if covered else ""
    if covered and _HOPPER not in covered:
        where += f", not for {_HOPPER} (H100, H200)"
    can = f"{title}: builds{where} (tried: one node)"
    if not driver.gpus:
        return Probed(
            "ok", f"{can}, also without a GPU; running needs one, here is {driver.detail}"
        )
    gpu = driver.gpus[0]
    if covered and gpu.architecture not in covered:
        return Probed("ok", f"{can}; does not run on {gpu.name}, {gpu.architecture}")
    log = Log()
    logger = log.logger(trt)
    if trt.Runtime(logger).deserialize_cuda_engine(built.plan) is None:
        return Probed("problem", f"{can}; {gpu.name} cannot load the engine: {log.text()}")
    return Probed("ok", f"{can}; {gpu.name}, {gpu.architecture} loads the engine")


def _too_old(driver: Driver, major: int) -> str | None:
    """CUDA runs on drivers of its own major version and newer."""
    if driver.cuda is None or driver.cuda[0] >= major:
        return None
    return f"needs a driver for CUDA {major}, this one is for {driver.cuda[0]}: update it"


def _cuda_major(module: str) -> int | None:
    """From the name of the wheel (``tensorrt-rtx-cu13``), the only place that says it."""
    names = importlib.metadata.packages_distributions().get(module, [])
    found = [int(m.group(1)) for name in names if (m := re.search(r"cu(\d+)", name))]
    return max(found, default=None)


def _architectures(trt: Any) -> list[str]:
    """What TensorRT-RTX builds for, as its bindings list it."""
    names = [n for n in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", n)]
    return [n.lower() for n in sorted(names, key=lambda n: int(n[2:]))]


PROBES: dict[str, Callable[[], Probed]] = {
    "driver": probe_driver,
    "cuda-bindings": probe_bindings,
    "tensorrt": lambda: probe_tensorrt("tensorrt"),
    "tensorrt-rtx": lambda: probe_tensorrt("tensorrt-rtx"),
}

if __name__ == "__main__":
    print(json.dumps(asdict(PROBES[sys.argv[1]]())))
