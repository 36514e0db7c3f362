"""The report of one part: every test, how it ended, why, and what it measured.

It is written anew, whole, with every change: a part that is killed keeps what it had.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from hhdeploy.doctor.probes import find_driver
from hhdeploy.packages import own_version
from tests.gpu.summary import write_whole

_PACKAGES = (
    "onnxruntime onnxruntime-gpu torch timm onnx onnx-ir onnxscript numpy peft safetensors pillow "
    "nncf openvino tensorrt tensorrt-rtx-cu13 cuda-bindings starlette uvicorn aiohttp "
    "prometheus-client"
).split()
# What the kernel says of its driver; on Linux, and not on a Jetson.
_KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
_VERSION = re.compile(r"\d+\.\d+(\.\d+)?")


@dataclass
class Entry:
    """One test.

    Attributes:
        outcome: ``not reached``, ``interrupted`` while it runs, ``passed``, ``failed``,
            ``skipped``.
    """

    test: str
    outcome: str = "not reached"
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


class PartReport:
    """Collects tests as they end, in ``file``."""

    def __init__(self, file: Path, tests: Sequence[str], *, dry: bool) -> None:
        self._file = file
        self._tests = {name: Entry(name) for name in tests}
        self._head = {"schema_version": 2, "dry": dry, "state": "running", **machine()}
        self._save()

    def begin(self, test: str) -> None:
        """A test starts."""
        self._tests[test].outcome = "interrupted"
        self._save()

    def note(self, test: str, figures: Mapping[str, object]) -> None:
        """Figures of a test that runs."""
        self._tests[test].figures |= {name: plain(value) for name, value in figures.items()}
        self._save()

    def add(self, test: str, report: pytest.TestReport) -> None:
        """One phase of a test; the worst phase counts."""
        found = self._tests[test]
        found.seconds = round(found.seconds + report.duration, 3)
        if report.skipped:
            assert isinstance(report.longrepr, tuple)
            found.outcome, found.reason = "skipped", report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            found.outcome = "failed"
            found.reason = crash.message if crash else str(report.longrepr)
        elif report.when == "call":
            found.outcome = "passed"
        self._save()

    def end(self, state: str) -> None:
        """The part is over: ``finished``, or how it was stopped."""
        self._head["state"] = state
        self._save()

    def _save(self) -> None:
        content = {**self._head, "tests": [asdict(test) for test in self._tests.values()]}
        write_whole(self._file, json.dumps(content, indent=1))


def machine() -> dict[str, Any]:
    """What figures were measured on: date, machine, GPUs, driver, versions."""
    driver = find_driver()
    kernel = _KERNEL_DRIVER.read_text() if _KERNEL_DRIVER.is_file() else ""
    version = _VERSION.search(kernel)
    versions = {"hhdeploy": own_version(), "python": platform.python_version()}
    absent = []
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "gpus": [asdict(gpu) for gpu in driver.gpus],
        "driver": driver.detail,
        "driver_version": version.group() if version else None,
        "versions": versions,
        "absent": absent,
    }


def plain(value: object) -> Any:
    """Figures as JSON has them: no infinities, no NaN."""
    to_json = getattr(value, "to_json", None)
    if to_json is not None:
        return to_json()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value
