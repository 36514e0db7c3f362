"""Every error that hhdeploy raises on purpose.

    HhdeployError
    ├── AdapterError        an adapter directory that cannot be used as it is
    ├── BackboneError       the timm model or its checkpoint
    ├── PlanError           adapters, backbone and options that do not go together
    │   ├── CapacityError   an adapter that does not fit the room a bundle reserves
    │   └── OptionError     an option's value, or options together, that can never be right
    ├── EngineError         TensorRT refused a graph, or to build an engine from it
    ├── BundleError         a bundle that is missing, damaged or of another version
    │   └── ConflictError   another process changed the bundle meanwhile, or is changing it
    ├── SessionError        a call on an open session: names, shapes, slots
    ├── DeviceError         the GPU, its driver or its runtime refused
    ├── DataError           image folders and image files
    ├── ParityError         outputs that differ from the training-time model
    ├── WriteError          the file system refused to write (disk full, no permission, exists)
    ├── ReadError           the file system refused to read what is there
    └── MissingDependencyError   an optional package is needed for what was asked

A message says what was expected, what was found, where, and what to do. The command line
prints it and exits with 1, with 2 for an OptionError, which is a wrong command line; everything
else is a bug and keeps its traceback.

A message speaks Python, and marks with backticks what is code: a parameter (`max_rank`), one with
a value (`max_rank=4`, `verify=False`), a call (`build('bundle', backend='tensorrt')`, made by
`as_code`). The command line shows the very same message with its own words in their place
(``hhdeploy.cli.wording``), so no message names a flag and none is written twice.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import sys
from collections.abc import Collection
from pathlib import PurePath
from types import ModuleType

# What a message marks as code; never over a line.
MARK = re.compile(r"`([^`\n]+)`")


class HhdeployError(Exception):
    """Base of all errors that are the input's or the environment's, not the program's."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The Python parameters that the message marks, each once, in its order."""
        names = (name for mark in MARK.findall(str(self)) for name in _parameters_in(mark))
        return tuple(dict.fromkeys(names))

    @property
    def parameter(self) -> str | None:
        """The first of `parameters`, e.g. ``max_rank``; None where the message names none."""
        return next(iter(self.parameters), None)


class AdapterError(HhdeployError):
    """An adapter directory that cannot be used as it is."""


class BackboneError(HhdeployError):
    """A timm model or checkpoint that cannot be loaded or is not the one expected."""


class PlanError(HhdeployError):
    """Adapters, backbone and options that do not go together."""


class CapacityError(PlanError):
    """An adapter that does not fit the room (rank, classes, sites, slots) that is reserved."""


class OptionError(PlanError):
    """An option's value, or options together, that no bundle, data or machine makes right."""


class EngineError(HhdeployError):
    """TensorRT refused a graph, or to build an engine from it; the message has all it said."""


class BundleError(HhdeployError):
    """A bundle that is missing, damaged or written by a newer version."""


class ConflictError(BundleError):
    """Another process changed a bundle meanwhile, or is changing it; nothing was written."""


class SessionError(HhdeployError):
    """A call on a session that cannot be answered: unknown adapter, wrong shape, no free row."""


class DeviceError(HhdeployError):
    """The GPU, its driver or its runtime refused: out of memory, no device, lost context."""


class DataError(HhdeployError):
    """Images that cannot be read, or an image folder that does not have the expected layout."""


class ParityError(HhdeployError):
    """Outputs that differ from the training-time model by more than the parity table allows."""


class WriteError(HhdeployError):
    """The file system refused to write; what was there before is untouched."""


class OccupiedError(WriteError):
    """Something is in the place that is to be written and may not be replaced.

    Attributes:
        reason: what it is or holds, a part of a sentence that names no path.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ReadError(HhdeployError):
    """The file system refused to read a file that is there."""


class MissingDependencyError(HhdeployError):
    """An optional package is not installed."""


def marked_code(mark: str) -> ast.Call | None:
    """The expressions and ``name=value`` of a mark, as the arguments of a call; None: no code."""
    try:
        parsed = ast.parse(f"_({mark})", mode="eval").body
    except SyntaxError:
        return None
    return parsed if isinstance(parsed, ast.Call) else None


def as_code(function: str, *values: object, **parameters: object) -> str:
    """A marked call for a message: what to run in Python, with these very values.

    >>> as_code("build", Path("bundle"), backend="tensorrt")
    "`build('bundle', backend='tensorrt')`"

    Args:
        function: of ``hhdeploy``, e.g. ``build``.
        *values: of the call; a path is shown as a string.
        **parameters: the same, by name.
    """
    shown = [_literal(value) for value in values]
    shown += [f"{name}={_literal(value)}" for name, value in parameters.items()]
    return f"`{function}({', '.join(shown)})`"


def _literal(value: object) -> str:
    if isinstance(value, str) and MARK.fullmatch(value):
        return value[1:-1]  # of another `as_code`
    text = repr(str(value) if isinstance(value, PurePath) else value)
    return text.replace("`", r"\x60")  # would end the mark


def _parameters_in(mark: str) -> list[str]:
    code = marked_code(mark)
    if code is None:
        return []
    bare = [a.value if isinstance(a, ast.Subscript) else a for a in code.args]
    names = [a.id for a in bare if isinstance(a, ast.Name)]
    return [*names, *(k.arg for k in code.keywords if k.arg is not None)]


def abbreviate(names: Collection[str], limit: int = 8) -> str:
    """The first ``limit`` names for a message, and how many there are if that is not all."""
    shown = ", ".join(itertools.islice(names, limit))
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"


def first_line(error: Exception) -> str:
    """What another package's error says, as a part of a sentence: its first line, and the second
    where the first ends with a colon, without the full stop; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    said = " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0]
    return said.rstrip(".")


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or raise `MissingDependencyError` with the pip line that brings it."""
    without_telemetry()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the Python package '{module}', which does not import here "
            f"({error}). Install it with: pip install 'hhdeploy[{extra}]'"
        ) from error


def without_telemetry() -> None:
    """Turn the telemetry of ONNX Runtime, OpenVINO and NNCF off, unless the user turned it on.

    It starts when one of them is imported, also by another package, and leaves an id in the home
    directory: this has to come before.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # processes started later inherit it
    # Intel's has no such variable: OpenVINO and NNCF do without a package that is not there.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
