"""What this machine can do: packages, runtimes, clashes. Nothing heavy is imported in-process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, and what to do about it."""

    what: str
    state: State
    detail: str


# Extra -> packages it needs, in the order users meet them.
_EXTRAS: dict[str, tuple[str, ...]] = {
    "export": ("torch", "timm", "onnx", "onnx-ir", "onnxscript"),
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime-gpu",),
    "openvino": ("openvino",),
}
_PROVIDERS = "import onnxruntime; print(*onnxruntime.get_available_providers())"
_CUDA = "import torch; print(torch.version.cuda, torch.cuda.is_available())"


def examine() -> list[Finding]:
    """All findings; a subprocess imports what is slow or may crash."""
    findings = [
        Finding(
            "machine",
            "ok",
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}",
        )
    ]
    findings += [_extra(name, packages) for name, packages in _EXTRAS.items()]
    findings.append(_clash())
    if _version("onnxruntime") or _version("onnxruntime-gpu"):
        findings.append(_probe("ONNX Runtime providers", _PROVIDERS))
    if _version("torch"):
        findings.append(_probe("torch: CUDA version, GPU usable", _CUDA))
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(name: str, packages: Sequence[str]) -> Finding:
    versions = {package: _version(package) for package in packages}
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        return Finding(
            f"extra {name}",
            "absent",
            f"{', '.join(missing)} not installed: pip install 'hhdeploy[{name}]'",
        )
    return Finding(f"extra {name}", "ok", ", ".join(f"{p} {v}" for p, v in versions.items()))


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
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it crashed"
        return Finding(what, "problem", reason)
    return Finding(what, "ok", done.stdout.strip())
