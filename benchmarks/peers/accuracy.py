"""Accuracy against latency: the starter models' held-out images in every precision of a CPU."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import THREADS
from benchmarks.models import STARTER, calibrated, starter_bundle
from benchmarks.peers.tasks import BATCH
from hhdeploy.choices import Device, Precision
from hhdeploy.cli.starter import Sample, Starter, samples
from hhdeploy.errors import SessionError
from hhdeploy.preprocess import open_image
from hhdeploy.runtime import Session, open_session

GRAPHS: dict[str, tuple[Device, Precision]] = {
    "ONNX Runtime float32": ("cpu", "float32"),
    "OpenVINO float32": ("openvino", "float32"),
    "OpenVINO bfloat16": ("openvino", "bfloat16"),
    "ONNX Runtime INT8": ("cpu", "int8"),
    "OpenVINO INT8": ("openvino", "int8"),
}
# What `calibrated` takes its ranges from is not judged on: every so-manieth file.
_CALIBRATED = 32


def accuracies(seconds: float) -> list[dict[str, Any]]:
    """Top-1 over four tasks in mixed batches of 8, and the median of a batch, runs in turn."""
    path = starter()
    judged = _judged()
    records = []
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, (device, precision) in GRAPHS.items():
            try:
                session = open_session(
                    path, device=device, precision=precision, threads=THREADS, cache=None
                )
            except SessionError as error:  # a processor without bfloat16
                records.append({"graph": name, "failed": str(error)[:160]})
                continue
            sessions[name] = stack.enter_context(session)
        right, batch = _answered(sessions, judged)
        times: dict[str, list[float]] = {name: [] for name in sessions}
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(next(iter(times.values()))) < 5:
            for name, session in sessions.items():
                begin = time.perf_counter()
                session.run(*batch)
                times[name].append(time.perf_counter() - begin)
    return records + [
        {
            "graph": name,
            "images": len(judged),
            "top1": round(100 * right[name] / len(judged), 2),
            "p50_ms": round(1e3 * statistics.median(times[name]), 3),
        }
        for name in sessions
    ]


def starter() -> Path:
    """The starter models in float32 and INT8, made if they are missing."""
    return calibrated(starter_bundle(), "int8")


def _judged() -> list[Sample]:
    files = sorted((STARTER / "images").rglob("*.png"))
    seen = {files[i * len(files) // _CALIBRATED] for i in range(_CALIBRATED)}
    return [s for s in samples(Starter.read(STARTER)) if s.path not in seen]


def _answered(
    sessions: dict[str, Session], judged: list[Sample]
) -> tuple[dict[str, int], tuple[Any, list[str]]]:
    """Right answers of each, and one batch to time with."""
    right = dict.fromkeys(sessions, 0)
    first: tuple[Any, list[str]] | None = None
    some = next(iter(sessions.values()))
    for start in range(0, len(judged), BATCH):
        part = judged[start : start + BATCH]
        names = [s.task for s in part]
        images = np.concatenate([some.preprocess([open_image(s.path)], s.task) for s in part])
        first = first or (images, names)
        for name, session in sessions.items():
            for sample, row in zip(part, session.run(images, names), strict=True):
                entry = session.entry(sample.task)
                assert entry is not None
                right[name] += entry.label(int(row.argmax())) == sample.truth
    assert first is not None
    return right, first
