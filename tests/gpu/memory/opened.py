"""One open session with many adapters, in a process of its own: what it takes, as JSON.

``python -m tests.gpu.memory.opened BUNDLE ADAPTER COUNT DEVICE PRECISION``
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import pytest

from hhdeploy.adapters.format import load_adapter
from hhdeploy.runtime import Session
from tests.gpu.opening import open_on
from tests.gpu.scale import DRY, SCALE
from tests.onnxruntime_double import stand_in

BATCH = 8


def main(path: str, adapter: str, count: int, device: str, precision: str) -> None:
    """Open, fill, run once; print what that took."""
    import numpy as np

    gpu_before, host_before = gpu_used(), resident()
    with open_on(Path(path), device, precision=precision, slots=count + 2) as session:
        fill(session, adapter, count)
        names = list(session.adapters)
        size = session.bundle.manifest.input_size
        images = np.zeros((BATCH, *size), np.float32)
        session.run(images, [names[i * len(names) // BATCH] for i in range(BATCH)])
        start = time.perf_counter()
        session.adapters.add("one-more", load_adapter(adapter))
        added = time.perf_counter() - start
        gpu = gpu_used()
        figures = {
            "adapters": count,
            "device": session.device,
            "bank_megabytes": session.adapters.rows.nbytes / 1e6,
            "host_megabytes": (resident() - host_before) / 1e6,
            "gpu_megabytes": None
            if gpu is None or gpu_before is None
            else (gpu - gpu_before) / 1e6,
            "one_more_ms": 1e3 * added,
        }
    print(json.dumps(figures))


def fill(session: Session, adapter: str, count: int) -> None:
    """``count`` adapters by name, each in its row; to the GPU they go once, not row by row."""
    bank, loaded = session.adapters, load_adapter(adapter)
    for name in bank:
        bank.remove(name)
    tell, changed = bank.row_changed, []
    bank.row_changed = changed.append
    for index in range(count):
        bank.add(f"adapter{index}", loaded)
    bank.row_changed = tell
    tell(changed[-1])


def gpu_used() -> int | None:
    """Bytes of the GPU that are in use, by whomever, beyond this process's CUDA context."""
    if DRY:
        return None
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for status in (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        # The context that CUDA's runtime uses too; kept, so that it is in both measurements.
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        cuda.cuCtxPushCurrent_v2(context),
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context)),
    ):
        if status:
            raise RuntimeError(f"the CUDA driver refused to tell its memory: status {status}")
    return total.value - free.value


def resident() -> int:
    """Bytes of this process in the machine's memory. Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        if DRY:
            stand_in(patch, "cuda", SCALE.providers["cuda"])
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
