"""Paired timing: competitors interleaved in one process, medians, one JSON line at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

THREADS = 2


@dataclass(frozen=True)
class Paired:
    """Milliseconds of two competitors that ran in turn.

    Attributes:
        a_ms: median of A.
        b_ms: median of B.
        ratio: median over the pairs of A / B.
        low: lower quartile of the pairs' ratios.
        high: upper quartile.
        pairs: how many.
    """

    a_ms: float
    b_ms: float
    ratio: float
    low: float
    high: float
    pairs: int

    def to_json(self) -> dict[str, float]:
        """Rounded figures."""
        return {k: round(v, 4) for k, v in self.__dict__.items()}


def paired(
    a: Callable[[], object], b: Callable[[], object], *, pairs: int = 20, warmup: int = 2
) -> Paired:
    """Time A and B in turn, the order swapped in every other pair."""
    for _ in range(warmup):
        a()
        b()
    times_a, times_b = [], []
    for index in range(pairs):
        for run, times in ((a, times_a), (b, times_b))[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    ratios = sorted(x / y for x, y in zip(times_a, times_b, strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    return Paired(
        statistics.median(times_a),
        statistics.median(times_b),
        statistics.median(ratios),
        quartiles[0],
        quartiles[2],
        pairs,
    )


def report(name: str, results: dict[str, Any]) -> None:
    """Print the figures, and everything as one JSON line last."""
    for key, value in results.items():
        if isinstance(value, Paired):
            print(
                f"{key:44} {value.a_ms:10.2f} ms / {value.b_ms:10.2f} ms = {value.ratio:.3f} "
                f"[{value.low:.3f}, {value.high:.3f}] of {value.pairs} pairs",
                flush=True,
            )
        else:
            print(f"{key:44} {value}", flush=True)
    plain = {k: v.to_json() if isinstance(v, Paired) else v for k, v in results.items()}
    print(json.dumps({"benchmark": name, "machine": machine(), "results": plain}))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":")[1].strip() for line in stream if line.startswith("model name")]
        cpu = names[0] if names else cpu
    except OSError:
        pass
    packages = ("torch", "timm", "onnxruntime", "openvino", "numpy", "onnx-ir")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": THREADS, "versions": versions}
