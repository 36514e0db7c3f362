"""What all benchmarks share: the machine's description and the JSON line at the end."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

from hhdeploy.timing import Paired

THREADS = 2
_PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "numpy", "onnx-ir")


def report(name: str, results: dict[str, Any]) -> None:
    """Print the figures, and everything as one JSON line last."""
    for key, value in results.items():
        print(f"{key:40} {value}", flush=True)
    plain = {k: v.to_json() if isinstance(v, Paired) else v for k, v in results.items()}
    print(json.dumps({"benchmark": name, "machine": machine(), "results": plain}), flush=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":")[1].strip() for line in stream if line.startswith("model name")]
        cpu = names[0] if names else cpu
    except OSError:
        pass
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": THREADS, "versions": versions}
