"""gpu-report.json and gpu-report.txt: every part, how it ended, why, and what it measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from hhdeploy.probes import find_driver

_PACKAGES = (
    "hhdeploy tensorrt tensorrt-rtx-cu13 cuda-bindings onnxruntime onnxruntime-gpu torch timm "
    "onnx numpy"
).split()
# What the kernel says of its driver; on Linux, and not on a Jetson.
_KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


# Where a run of these tests alone keeps its report; not there in a run of all tests.
REPORT: pytest.StashKey[Report] = pytest.StashKey()


@dataclass
class Part:
    """One test."""

    test: str
    outcome: str
    reason: str
    seconds: float
    figures: dict[str, Any]


@dataclass
class Report:
    """Collects parts as they end."""

    parts: dict[str, Part] = field(default_factory=dict)

    def add(self, report: pytest.TestReport) -> None:
        """One phase of a test; the worst phase counts."""
        test = report.nodeid.rpartition("tests/gpu/")[2]
        part = self.parts.setdefault(test, Part(test, "passed", "", 0.0, {}))
        part.seconds += report.duration
        part.figures |= dict(report.user_properties)
        if report.skipped:
            assert isinstance(report.longrepr, tuple)
            part.outcome, part.reason = "skipped", report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            part.outcome = "failed"
            part.reason = crash.message if crash else str(report.longrepr)

    def to_json(self) -> dict[str, Any]:
        """gpu-report.json."""
        driver = find_driver()
        return {
            "schema_version": 1,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}",
            "driver": driver.detail,
            "kernel_driver": _KERNEL_DRIVER.read_text() if _KERNEL_DRIVER.is_file() else None,
            "gpus": [asdict(gpu) for gpu in driver.gpus],
            "versions": _versions(),
            "passed": self._count("passed"),
            "failed": self._count("failed"),
            "skipped": self._count("skipped"),
            "parts": [asdict(part) for part in self.parts.values()],
        }

    def text(self, content: Mapping[str, Any]) -> str:
        """gpu-report.txt: what ran line by line, what was skipped by reason."""
        versions = ", ".join(f"{name} {v}" for name, v in content["versions"].items())
        lines = [
            f"date      {content['date']}",
            f"machine   {content['machine']}",
            f"GPU       {content['driver']}",
            f"versions  {versions}",
            f"parts     {content['passed']} passed, {content['failed']} failed, "
            f"{content['skipped']} skipped",
        ]
        ran = [part for part in self.parts.values() if part.outcome != "skipped"]
        lines += ["", *(_line(part) for part in ran)]
        skipped: dict[str, list[str]] = {}
        for part in self.parts.values():
            if part.outcome == "skipped":
                skipped.setdefault(part.reason, []).append(part.test)
        for reason, tests in skipped.items():
            unique = dict.fromkeys(_name(test) for test in tests)
            names = textwrap.fill("; ".join(unique), 98)
            lines += ["", f"skipped {len(tests)}: {reason}", textwrap.indent(names, "  ")]
        return "\n".join(lines)

    def write(self, root: Path) -> str:
        """Write both files, ``HHDEPLOY_GPU_REPORT`` naming them; the text and where it is."""
        stem = Path(os.environ.get("HHDEPLOY_GPU_REPORT", root / "gpu-report"))
        content = self.to_json()
        text = self.text(content)
        stem.parent.mkdir(parents=True, exist_ok=True)
        file = stem.with_name(f"{stem.name}.txt")
        file.write_text(f"{text}\n", encoding="utf-8")
        stem.with_name(f"{stem.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        return f"{text}\n\nwritten to {file} and .json"

    def _count(self, outcome: str) -> int:
        return sum(part.outcome == outcome for part in self.parts.values())


def _line(part: Part) -> str:
    figures = ", ".join(f"{name} {_short(value)}" for name, value in part.figures.items())
    about = "; ".join(filter(None, (part.reason.partition("\n")[0], figures)))
    parameters = "".join(part.test.partition("[")[1:])
    start = f"{part.outcome:7} {part.seconds:7.1f} s  {_name(part.test)}{parameters}"
    return f"{start}: {about}" if about else start


def _name(test: str) -> str:
    """``test_engines.py::test_parity[...]`` as ``engines: parity``."""
    module, _, function = test.partition("[")[0].partition("::")
    return f"{module.removeprefix('test_')[:-3]}: {function.removeprefix('test_')}".replace(
        "_", " "
    )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
