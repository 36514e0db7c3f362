"""What all benchmarks share: a mixed batch, the machine's description, the JSON line at the end."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hhdeploy.timing import Paired, processor

if TYPE_CHECKING:
    from hhdeploy.runtime import Session

THREADS = 2
# What decides over the speed of INT8 and bfloat16 -> its flags in /proc/cpuinfo.
_INSTRUCTIONS = {
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "BF16": {"avx512_bf16"},
    "AMX": {"amx_tile"},
}
_PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "numpy", "onnx-ir")


def work_directory() -> Path:
    """``$HHDEPLOY_BENCH_DIR``, else a directory below the system's temporary one."""
    root = os.environ.get("HHDEPLOY_BENCH_DIR")
    path = Path(root) if root else Path(tempfile.gettempdir()) / "hhdeploy-bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def runner(session: Session, batch: int) -> Callable[[], object]:
    """One run of a session: seeded noise, the bundle's adapters in turn."""
    size = session.bundle.manifest.input_size
    images = np.random.default_rng(0).standard_normal((batch, *size), np.float32)
    entries = session.bundle.manifest.adapters
    names = [entries[i % len(entries)].name for i in range(batch)]
    return lambda: session.run(images, names)


def report(name: str, results: dict[str, Any], *, threads: int = THREADS) -> None:
    """Print the figures, and everything as one JSON line last."""
    for key, value in results.items():
        print(f"{key:40} {value}", flush=True)
    plain = {k: v.to_json() if isinstance(v, Paired) else v for k, v in results.items()}
    print(
        json.dumps({"benchmark": name, "machine": machine(threads), "results": plain}), flush=True
    )


def machine(threads: int = THREADS) -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"cpu": _processor(), "cores": os.cpu_count(), "threads": threads, "versions": versions}


def _processor() -> str:
    """Its name and, on Linux, what its name may not tell: what speeds 8 and 16 bits up."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    found = [title for title, names in _INSTRUCTIONS.items() if names & flags]
    return f"{processor()} with {', '.join(found)}" if found else processor()
