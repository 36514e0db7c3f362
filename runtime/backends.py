"""What computes the logits: the protocol of a backend, and the choice by device name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST, EngineEntry, Manifest
from hhdeploy.choices import (
    BACKENDS,
    QUANTISED,
    Device,
    Precision,
    Runner,
    member,
    whole,
    yes_or_no,
)
from hhdeploy.errors import (
    BundleError,
    DeviceError,
    MissingDependencyError,
    SessionError,
)
from hhdeploy.runtime.processor import overflows_in_int8

Images = NDArray[np.float32]
Ids = NDArray[np.int64]
Bank = NDArray[np.float32]
# A graph, see `Backend.run`.
Run = Callable[[Images, Ids | None], NDArray[np.float32]]

# Of what a graph takes or gives: name -> shape.
Shapes = Mapping[str, Sequence[object]]

# Those whose runs can be recorded as CUDA graphs.
RECORDING_DEVICES: tuple[Runner, ...] = ("cuda", *BACKENDS)
# Those that give features and tokens too.
_ALL_OUTPUTS: tuple[Runner, ...] = ("cpu", "openvino")
# What a CPU may be tuned for: one answer at a time, or many.
HINTS = ("latency", "throughput")
# Threads, and batches at the same time: a hundred thousand take all of a machine's memory.
MOST_AT_ONCE = 1024


class Backend(Protocol):
    """One compiled graph, ready to run. `run` may be called from several threads."""

    @property
    def name(self) -> str:
        """What computes, e.g. ``onnxruntime CPUExecutionProvider``."""

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """Float32 [batch, columns]: all outputs of an image side by side, see `Manifest.split`;
        ``ids`` None for a folded graph."""

    def row_changed(self, row: int) -> None:
        """A row of the bank was written; nobody is using it, others may be in use."""

    def close(self) -> None:
        """Free the graph. `run` raises `closed` after it, `row_changed` does nothing."""


class QuantisedBackend:
    """A quantised graph, whose own answers for an image that is no numbers would be numbers: a
    quantiser makes of NaN and of infinity what it makes of a picture."""

    def __init__(self, graph: Backend) -> None:
        self._graph = graph
        # Not a call of its own for what changes nothing.
        self.row_changed, self.close = graph.row_changed, graph.close

    @property
    def name(self) -> str:
        """Of the graph."""
        return self._graph.name

    def run(self, images: Images, ids: Ids | None) -> NDArray[np.float32]:
        """As the graph, and NaN for each image with NaN or infinities; -inf past an adapter's
        classes stays."""
        found = self._graph.run(images, ids)
        for index in np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3))):
            found[index][~np.isneginf(found[index])] = np.nan
        return found


def closed() -> SessionError:
    """For a run of a backend that was closed, perhaps while it began."""
    return SessionError("the session is closed.")


def side_by_side(outputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The outputs of a run, [batch, ...] each, as [batch, columns]; one of two dimensions as it
    is."""
    first = outputs[0]
    if len(outputs) == 1:
        return first if first.ndim == 2 else first.reshape(len(first), -1)
    return np.concatenate([output.reshape(len(first), -1) for output in outputs], axis=1)


@dataclass(frozen=True)
class BackendOptions:
    """How to open a graph.

    Attributes:
        precision: of the graph.
        threads: of one run on the CPU; None leaves it to the runtime.
        contexts: runs at the same time on a native engine, each with buffers of its own. Other
            runtimes run calls at the same time as they come.
        cuda_graphs: replay recorded CUDA graphs; devices of `RECORDING_DEVICES` only.
        hint: of `HINTS`. ``latency``: a run has all threads, further calls wait. ``throughput``:
            threads are divided among calls at the same time; OpenVINO only.
        cache: directory of what is compiled at the start: OpenVINO's models, TensorRT-RTX's
            kernels. None: neither read nor written.
    """

    precision: Precision
    threads: int | None
    contexts: int = 1
    cuda_graphs: bool = False
    hint: str = "latency"
    cache: Path | None = None


def check_options(*, threads: object, contexts: object, cuda_graphs: object, hint: object) -> None:
    """What a user gave for `BackendOptions`, before anything is opened. Raises `SessionError`."""
    for option, given in (("threads", threads), ("contexts", contexts)):
        if given is not None:
            whole(given, option, 1, MOST_AT_ONCE, SessionError)
    yes_or_no(cuda_graphs, "cuda_graphs", SessionError)
    if member(HINTS, hint) is None:
        raise SessionError(f"`hint`: expected {' or '.join(HINTS)}, found {hint!r}.")


@dataclass(frozen=True)
class Target:
    """Where a session computes.

    Attributes:
        device: what runs the graph or the engine.
        engine: the bundle's engine that fits this machine; None for runtimes that load graphs.
    """

    device: Runner
    engine: EngineEntry | None = None


def find_target(manifest: Manifest, device: Device, precision: Precision) -> Target:
    """What a device name means for a bundle on this machine. Reads no graph and no engine.

    Raises:
        DeviceError: a native engine was asked for, and there is no GPU.
        BundleError: a native engine was asked for, and none fits.
        MissingDependencyError: the device's runtime is not installed.
    """
    if device == "auto":
        return _fastest(manifest, precision)
    backend = member(BACKENDS, device)
    if backend is None:
        return Target(device)
    from hhdeploy.runtime.tensorrt_backend import find_engine

    return Target(backend, find_engine(manifest, backend, precision))


def open_backend(
    bundle: Bundle, bank: Bank | None, target: Target, options: BackendOptions
) -> Backend:
    """Open a bundle's graph or engine; a quantised one gives no numbers for what is none.

    Raises:
        SessionError: a device that this machine does not have, or an option or a precision that
            it lacks.
        BundleError: no graph of the precision, or a file that was changed.
        DeviceError: the GPU refused.
        MissingDependencyError: the device's runtime is not installed.
    """
    backend = _opened(bundle, bank, target, options)
    return backend if member(QUANTISED, options.precision) is None else QuantisedBackend(backend)


def _opened(bundle: Bundle, bank: Bank | None, target: Target, options: BackendOptions) -> Backend:
    if options.hint != "latency" and target.device != "openvino":
        raise SessionError(
            f"`hint={options.hint!r}`: `device={target.device!r}` has none; expected openvino."
        )
    if options.cuda_graphs and target.device not in RECORDING_DEVICES:
        raise SessionError(
            f"`cuda_graphs`: `device={target.device!r}` has none; expected one of "
            f"{', '.join(RECORDING_DEVICES)}."
        )
    if options.precision == "bfloat16" and target.device == "cpu":
        raise SessionError(
            "`precision='bfloat16'`: ONNX Runtime has no kernels of it on a CPU, expected "
            "`device='openvino'` or a GPU's. Or use `precision='float32'`."
        )
    if bundle.manifest.features and target.device not in _ALL_OUTPUTS:
        raise SessionError(
            f"`device={target.device!r}` gives logits alone, this bundle has "
            f"{', '.join(bundle.manifest.outputs)}; expected one of {', '.join(_ALL_OUTPUTS)}."
        )
    if target.engine is not None:
        from hhdeploy.runtime.tensorrt_backend import TensorRtBackend

        return TensorRtBackend(bundle, bank, target.engine, options)
    if target.device == "openvino":
        from hhdeploy.runtime.openvino_backend import open_openvino

        return open_openvino(bundle, bank, options)
    from hhdeploy.runtime.onnxruntime_backend import open_onnxruntime

    # Here, not earlier: a machine that runs engines needs no graph.
    graph = bundle.graph(options.precision)
    return open_onnxruntime(graph, bank, target.device, options, bundle.manifest)


def check_tensors(graph: Path, takes: Shapes, gives: Shapes, manifest: Manifest) -> None:
    """Compare a graph's inputs, and its outputs in their order, with those that the manifest
    tells, which no hash does. The first size of each is open, and so is one that is no number.

    Raises:
        BundleError: they are others, or of another shape, or order: answers would be cut in other
            places, or computed with a bank that nobody filled.
    """
    tensors = manifest.tensors
    outputs = {name: tensors.pop(name) for name in manifest.outputs}
    inputs = {name: tensors[name] for name in sorted(tensors.keys() - manifest.extra_tensors)}
    takes = dict(sorted(takes.items()))  # which are fed by name
    for what, found, told in (("inputs", takes, inputs), ("outputs", gives, outputs)):
        if list(found) != list(told) or not all(_fits(found[name], told[name]) for name in told):
            raise BundleError(
                f"{graph.with_name(MANIFEST)}: tensors: expected the {what} of {graph.name}, "
                f"{dict(found)}, found {told}. Copy or export the bundle again."
            )


def _fits(shape: Sequence[object], told: Sequence[object]) -> bool:
    pairs = zip(shape[1:], told[1:], strict=False)
    return len(shape) == len(told) and all(n == m for n, m in pairs if isinstance(n, int))


def _fastest(manifest: Manifest, precision: Precision) -> Target:
    """An engine of the bundle, else ONNX Runtime on a GPU, else the CPU."""
    built = {e.backend for e in manifest.engines if e.precision == precision}
    for backend in BACKENDS:
        if backend not in built:
            continue
        try:
            return find_target(manifest, backend, precision)
        except (BundleError, DeviceError, MissingDependencyError):
            continue  # another version, another GPU, none at all: the engine is not for here
    from hhdeploy.runtime.onnxruntime_backend import cuda_available

    if manifest.features:
        return Target(_fastest_cpu(precision))
    return Target("cuda" if cuda_available() else _fastest_cpu(precision))


def _fastest_cpu(precision: Precision) -> Runner:
    """OpenVINO if it is new enough and computes the precision exactly, else ONNX Runtime, which
    has no bfloat16 on a CPU."""
    if precision == "bfloat16":
        return "openvino"
    if precision == "int8" and overflows_in_int8():
        return "cpu"
    from hhdeploy.runtime.openvino_backend import import_openvino

    try:
        import_openvino("a session")
    except MissingDependencyError:
        return "cpu"
    return "openvino"
