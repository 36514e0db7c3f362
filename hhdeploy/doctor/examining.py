"""What this machine can do: packages, runtimes, clashes. Nothing heavy is imported in-process."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hhdeploy.doctor.probes import PROBES, ProbeState
from hhdeploy.errors import without_telemetry
from hhdeploy.packages import EXTRAS, INCLUDED, is_older
from hhdeploy.runtime.processor import cores, int8_units


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, and what to do about it."""

    what: str
    state: ProbeState
    detail: str


# Tried in a process of their own, see `hhdeploy.doctor.probes`.
_PROBED = ("rtx", "tensorrt")
_PROVIDERS = "import onnxruntime; print(*onnxruntime.get_available_providers())"
_CUDA = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
_TITLES = {"driver": "NVIDIA driver"}
_PATIENCE_S = 120


def examine() -> list[Finding]:
    """All findings; a subprocess imports what is slow or may crash."""
    without_telemetry()  # of those as well
    findings = [
        Finding(
            "machine",
            "ok",
            f"{platform.system()} {platform.machine()}, {cores()}, "
            f"Python {platform.python_version()}",
        )
    ]
    findings.append(int8_finding())
    findings += [_extra(name) for name in EXTRAS if name not in _PROBED]
    findings.append(_clash())
    if _version("onnxruntime") or _version("onnxruntime-gpu"):
        findings.append(_probe("ONNX Runtime providers", _PROVIDERS))
    if _version("torch"):
        findings.append(_probe("torch: CUDA version, GPU usable", _CUDA))
    findings += [_gpu_probe(name) for name in PROBES]
    return findings


def int8_finding() -> Finding:
    """How graphs of `calibrate` run on this processor."""
    what, units = "INT8 on this processor", int8_units()
    if units:
        return Finding(what, "ok", f"{' and '.join(units)}: products are exact")
    slower = "hhdeploy's sessions take exact kernels of ONNX Runtime, which are slower"
    if units is None:
        return Finding(what, "ok", f"nothing says what it multiplies with: {slower}")
    return Finding(
        what, "absent", f"no VNNI and no AMX: the usual kernels overflow in silence; {slower}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(name: str) -> Finding:
    """Whether all that an extra brings is there, and new enough."""
    bounds = dict(EXTRAS[name])
    for included in INCLUDED.get(name, ()):
        bounds |= EXTRAS[included]
    versions = {package: _version(package) for package in bounds}
    if name != "cpu" and "onnxruntime" in versions:  # to others the GPU's wheel is as good
        versions["onnxruntime"] = versions["onnxruntime"] or _version("onnxruntime-gpu")
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        return Finding(
            f"extra {name}",
            "absent",
            f"{', '.join(missing)} not installed: pip install 'hhdeploy[{name}]'",
        )
    found = {package: version for package, version in versions.items() if version is not None}
    old = [f"{p} {v} (expected {bounds[p]})" for p, v in found.items() if is_older(v, bounds[p])]
    if old:
        return Finding(
            f"extra {name}",
            "problem",
            f"too old: {', '.join(old)}: pip install -U 'hhdeploy[{name}]'",
        )
    return Finding(f"extra {name}", "ok", ", ".join(f"{p} {found[p]}" for p in EXTRAS[name]))


def _clash() -> Finding:
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        return Finding(
            "onnxruntime clash",
            "problem",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip "
            "uninstall onnxruntime onnxruntime-gpu, then install one of them",
        )
    return Finding("onnxruntime clash", "ok", "at most one of onnxruntime, onnxruntime-gpu")


def _probe(what: str, code: str) -> Finding:
    """Whatever a line of Python prints."""
    return _run(what, ["-c", code], lambda printed: Finding(what, "ok", printed))


def _gpu_probe(name: str) -> Finding:
    """One of `hhdeploy.doctor.probes`."""
    what = _TITLES.get(name, name)
    command = ["-m", "hhdeploy.doctor.probes", name]
    return _run(what, command, lambda printed: Finding(what, **json.loads(printed)))


def _run(what: str, arguments: Sequence[str], read: Callable[[str], Finding]) -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        return Finding(what, "problem", f"no answer within {_PATIENCE_S} s")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"it crashed (exit code {done.returncode})"
        return Finding(what, "problem", reason)
    return read(done.stdout.strip())
