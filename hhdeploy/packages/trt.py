"""TensorRT and TensorRT-RTX behind one name: the only place that imports either.

Both offer the API that hhdeploy uses: Builder, OnnxParser, Runtime, strongly typed networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, get_args

from hhdeploy.errors import SessionError, require
from hhdeploy.packages.extras import check_version

TensorRt = Literal["tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[TensorRt, ...] = get_args(TensorRt)

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}


def import_tensorrt(backend: str) -> ModuleType:
    """The Python bindings of a backend: ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        MissingDependencyError: they do not import here, or are too old.
        SessionError: no such backend.
    """
    if backend not in _MODULES:
        raise SessionError(f"unknown backend {backend!r}: expected {' or '.join(BACKENDS)}.")
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
