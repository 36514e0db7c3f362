"""The packages around hhdeploy: versions, what each extra brings, TensorRT under one name.

The bounds are pyproject.toml's, for what has to refuse an older package and for ``hhdeploy
doctor``; a test compares both, as an installed package cannot read pyproject.toml. TensorRT and
TensorRT-RTX offer the same API (Builder, OnnxParser, Runtime, strongly typed networks), and
nothing else imports either.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

from hhdeploy.choices import TensorRt
from hhdeploy.errors import MissingDependencyError, require

_MODULES: Final[Mapping[TensorRt, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS: Final[Mapping[TensorRt, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_PACKAGES: Final[Mapping[TensorRt, str]] = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx-cu13",
}

# Extra -> distribution -> oldest version, in the order users meet them.
EXTRAS: Final[Mapping[str, Mapping[str, str]]] = {
    "export": {
        "torch": "2.9",
        "timm": "1.0.20",
        "onnx": "1.19",
        "onnx-ir": "0.1.15",
        "onnxscript": "0.6.2",
    },
    "transformers": {"transformers": "5.0"},
    "peft": {"peft": "0.17"},
    "cpu": {"onnxruntime": "1.22"},
    "gpu": {"onnxruntime-gpu": "1.22"},
    # 2024.6 computes INT8 side branches wrongly, without an error.
    "openvino": {"openvino": "2025.0"},
    # Strongly typed networks with int64 inputs and the progress monitor.
    "rtx": {"tensorrt-rtx-cu13": "1.2", "cuda-bindings": "13.0"},
    "tensorrt": {"tensorrt": "10.3", "cuda-bindings": "12.6"},
    "serve": {
        "aiohttp": "3.10.5",
        "cryptography": "42",
        "grpcio-health-checking": "1.62",
        "grpcio-reflection": "1.62",
        "hpack": "4.0",
        "starlette": "0.40",
        "uvicorn": "0.30",
        "prometheus-client": "0.20",
        "protobuf": "5",
        "tritonclient": "2.52",
    },
    "ray": {"ray": "2.60"},
    "calibrate": {"nncf": "3.4"},
    "sign": {"model-signing": "1.1", "pyopenssl": "24.0"},
    "hub": {"huggingface-hub": "0.34"},
}
# Extra -> extras that it brings along.
INCLUDED: Final[Mapping[str, tuple[str, ...]]] = {
    "transformers": ("export",),
    "peft": ("export",),
    "ray": ("serve",),
    "calibrate": ("export", "cpu"),
}


def own_version() -> str:
    """hhdeploy's version as installed; ``unknown`` in a checkout that is only on the path."""
    try:
        return importlib.metadata.version("hhdeploy")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def is_older(found: str, bound: str) -> bool:
    """Whether a version is below a bound; suffixes of builds and pre-releases do not count.

    >>> is_older("2024.6.0-17404-4c0f47d2335", "2025.0"), is_older("2025.0", "2025.0.0")
    (True, False)
    """
    ours, theirs = _numbers(found), _numbers(bound)
    length = max(len(ours), len(theirs))
    return ours + (0,) * (length - len(ours)) < theirs + (0,) * (length - len(theirs))


def check_version(extra: str, package: str, found: str, *, title: str | None = None) -> None:
    """Refuse a package below the bound of its extra.

    Args:
        extra, package: a key of `EXTRAS`, and one below it.
        found: the version that imports here.
        title: what the message calls it; None: ``package``.

    Raises:
        MissingDependencyError: with the pip line that upgrades it.
    """
    bound = EXTRAS[extra][package]
    if is_older(found, bound):
        raise MissingDependencyError(
            f"{title or package}: expected version {bound} or newer, found {found}. Upgrade with: "
            f"pip install -U 'hhdeploy[{extra}]'"
        )


def import_tensorrt(backend: TensorRt) -> ModuleType:
    """The Python bindings of a backend: ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        MissingDependencyError: they do not import here, or are too old.
    """
    module = require(_MODULES[backend], _EXTRAS[backend], f"backend {backend!r}")
    check_version(_EXTRAS[backend], _PACKAGES[backend], module.__version__, title=backend)
    return module


@dataclass
class Log:
    """What TensorRT said, kept whole; errors are what `HhdeployError` messages quote.

    Attributes:
        errors: messages of severity ERROR and INTERNAL_ERROR.
        warnings: messages of severity WARNING.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def logger(self, trt: ModuleType) -> Any:
        """A ``trt.ILogger`` that writes here; keep it as long as what it was given to."""
        severities = trt.ILogger

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            """Collects messages by severity; TensorRT calls it from its own threads."""

            def __init__(self, log: Log) -> None:
                trt.ILogger.__init__(self)
                self._sinks: dict[Any, Callable[[str], None]] = {
                    severities.INTERNAL_ERROR: log.errors.append,
                    severities.ERROR: log.errors.append,
                    severities.WARNING: log.warnings.append,
                }

            def log(self, severity: Any, message: str) -> None:
                """Called by TensorRT."""
                if sink := self._sinks.get(severity):
                    sink(message)

        return Logger(self)

    def text(self) -> str:
        """All errors, each once, in the order they came."""
        return "\n".join(dict.fromkeys(self.errors))


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()
