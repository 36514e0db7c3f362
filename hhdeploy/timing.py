"""Fair timing on a noisy machine: competitors run in turn, medians and ratios are reported."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

Timed = Callable[[], object]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call over several runs."""

    median_ms: float
    p90_ms: float
    min_ms: float
    runs: int

    def to_json(self) -> dict[str, float]:
        """Rounded figures."""
        return {k: round(v, 4) for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Paired:
    """Two competitors A and B that ran in turn.

    Attributes:
        a: latency of A.
        b: latency of B.
        ratio: median over the pairs of A / B.
        low: lower quartile of the pairs' ratios.
        high: upper quartile.
    """

    a: Latency
    b: Latency
    ratio: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        """Rounded figures."""
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "ratio": round(self.ratio, 4),
            "quartiles": [round(self.low, 4), round(self.high, 4)],
        }

    def __str__(self) -> str:
        return (
            f"{self.a.median_ms:.2f} ms / {self.b.median_ms:.2f} ms = {self.ratio:.3f} "
            f"(quartiles {self.low:.3f} to {self.high:.3f} of {self.a.runs} pairs)"
        )


def latency(run: Timed, *, runs: int = 20, warmup: int = 2) -> Latency:
    """Time one function."""
    for _ in range(warmup):
        run()
    return _summary([_milliseconds(run) for _ in range(runs)])


def paired(a: Timed, b: Timed, *, pairs: int = 20, warmup: int = 2) -> Paired:
    """Time A and B in turn, the order swapped in every other pair, so that drift cancels."""
    for _ in range(warmup):
        a()
        b()
    times_a, times_b = [], []
    for index in range(max(2, pairs)):
        if index % 2:
            times_b.append(_milliseconds(b))
            times_a.append(_milliseconds(a))
        else:
            times_a.append(_milliseconds(a))
            times_b.append(_milliseconds(b))
    ratios = [x / y for x, y in zip(times_a, times_b, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Paired(_summary(times_a), _summary(times_b), middle, low, high)


def _milliseconds(run: Timed) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _summary(times: list[float]) -> Latency:
    ordered = sorted(times)
    p90 = float(np.percentile(ordered, 90))  # between two runs, as load tests have it
    return Latency(statistics.median(ordered), p90, ordered[0], len(ordered))


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
