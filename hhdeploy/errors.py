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
"""

from __future__ import annotations

import importlib
from types import ModuleType


class HhdeployError(Exception):
    """Base of all errors that are the input's or the environment's, not the program's."""


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


class ReadError(HhdeployError):
    """The file system refused to read a file that is there."""


class MissingDependencyError(HhdeployError):
    """An optional package is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or raise `MissingDependencyError` with the pip line that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the Python package '{module}', which does not import here "
            f"({error}). Install it with: pip install 'hhdeploy[{extra}]'"
        ) from error
