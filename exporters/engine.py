"""TensorRT engines from the ONNX graphs of a bundle: one builder for TensorRT and TensorRT-RTX.

Needs NumPy and the backend alone; TensorRT-RTX needs no GPU to build. Networks are always
strongly typed: the precision is in the graph, there are no precision flags.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hhdeploy.bundle.engines import sm_number
from hhdeploy.bundle.manifest import Range
from hhdeploy.choices import Precision, TensorRt, listed, whole, yes_or_no
from hhdeploy.errors import EngineError, OptionError, PlanError
from hhdeploy.exporters.engine_errors import explain, parser_errors
from hhdeploy.packages import Log, import_tensorrt

# (phase, steps done, steps in all); a phase that is over has done == all.
Phases = Callable[[str, int, int], None]

# An input's dimensions; a range where they vary.
Shape = tuple[int | Range, ...]
_OLDEST_FP8 = 89


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is to be built.

    Attributes:
        batch: images of one run: fewest, the number to tune for, most.
        max_slots: rows of the largest bank; None: 1,024, or what a tensor can hold.
        architectures: ``sm89`` ... to build for (TensorRT-RTX only); empty: portable over Ampere
            and newer RTX GPUs, and with TensorRT the GPU of this machine.
        bank_as_constant: bake the bundle's bank into the engine.
        hardware_compatible: TensorRT only: one engine for Ampere and newer, at some speed.
        optimization_level: 0 (fastest build) to 5 (fastest engine); None: the backend's own.
        workspace_mib: scratch memory that a layer may use; None: all there is.
        tf32: let float32 products round their inputs to 10 bits; TensorRT's own default is yes.
    """

    batch: Range = (1, 8, 32)
    max_slots: int | None = None
    architectures: tuple[str, ...] = ()
    bank_as_constant: bool = False
    hardware_compatible: bool = False
    optimization_level: int | None = None
    workspace_mib: int | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        given = listed(self.batch, "batch", "numbers of images")
        batch = tuple(whole(number, "batch", 0) for number in given)
        if len(batch) != 3:
            raise OptionError(f"`batch`: expected min, opt and max, found {self.batch!r}.")
        names = listed(self.architectures, "architectures", "names")
        found: dict[str, Any] = {"batch": batch, "architectures": tuple(dict.fromkeys(names))}
        for name, least in (("max_slots", 1), ("optimization_level", 0), ("workspace_mib", 1)):
            if (value := getattr(self, name)) is not None:
                found[name] = whole(value, name, least)
        for name in ("bank_as_constant", "hardware_compatible", "tf32"):
            found[name] = yes_or_no(getattr(self, name), name)
        for name, value in found.items():  # as the manifest has them
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine, as TensorRT holds it (``plan`` supports the buffer protocol)."""

    plan: Any
    version: str
    seconds: float


def check_build_options(backend: TensorRt, precision: Precision, options: BuildOptions) -> None:
    """What no bundle could make right.

    Raises:
        OptionError: a range out of order, options that do not go together, one that the backend
            ignores or lacks, an architecture that cannot compute the precision.
    """
    least, common, most = options.batch
    if not 1 <= least <= common <= most:
        raise OptionError(
            f"`batch`: expected 1 <= min <= opt <= max, found {least}, {common}, {most}."
        )
    if options.bank_as_constant and options.max_slots is not None:
        raise OptionError(
            "`max_slots` does not go with `bank_as_constant`: the engine has no bank input then."
        )
    if options.tf32 and precision != "float32":
        raise OptionError(f"`tf32` is for float32 graphs; a {precision} graph says its precisions.")
    if backend == "tensorrt" and options.architectures:
        raise OptionError(
            "`architectures`: TensorRT builds for the GPU of the machine that it runs on. Build "
            "there; or use `hardware_compatible=True`, or `backend='tensorrt-rtx'`."
        )
    if backend == "tensorrt-rtx":
        lacking = {
            "`hardware_compatible`": (
                options.hardware_compatible,
                "without `architectures` its engines are portable over Ampere and newer already",
            ),
            "`workspace_mib`": (
                options.workspace_mib is not None,
                "it sizes its scratch memory itself",
            ),
            # Accepted by its API; the engines of levels 0, 3 and 5 are the same to the byte (1.7).
            "`optimization_level`": (
                options.optimization_level is not None,
                "it always builds the same engine, and tunes it on the GPU that runs it",
            ),
        }
        for name, (given_flag, why) in lacking.items():
            if given_flag:
                raise OptionError(f"{name} has no effect in TensorRT-RTX: {why}. Leave it out.")
    if precision == "fp8":
        old = [a for a in options.architectures if sm_number(a) < _OLDEST_FP8]
        if old or (backend == "tensorrt-rtx" and not options.architectures):
            found = ", ".join(old) or "a portable engine, which has to run on sm80 too"
            raise OptionError(
                f"FP8 needs sm{_OLDEST_FP8} (Ada) or newer, found {found}. Pass "
                "`architectures=['sm89']` or newer, or build with `precision='int8'`."
            )


def engine_from_onnx(
    graph: Path,
    backend: TensorRt,
    shapes: Mapping[str, Shape],
    options: BuildOptions,
    progress: Phases = lambda phase, done, steps: None,
) -> BuiltEngine:
    """Compile a graph. Weights beside it are read from disk.

    Args:
        graph: the ONNX file.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        shapes: input name -> dimensions.
        options: checked by `check_build_options`; what the shapes say is not read from them.
        progress: called from TensorRT's threads.

    Raises:
        EngineError: the parser or the builder refused; the message has all that it said, with
            nodes and sites.
        PlanError: an architecture that this backend does not know.
        MissingDependencyError: the backend is not installed.
    """
    trt = import_tensorrt(backend)
    log = Log()
    logger = log.logger(trt)
    start = time.perf_counter()
    builder = new_builder(trt, logger, log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(f"{backend} cannot parse {graph}:\n{parser_errors(parser, log)}")
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, shapes))
    _configure(trt, config, options, backend)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise EngineError(f"{backend} cannot build an engine from {graph}:\n{explain(log.text())}")
    return BuiltEngine(plan, trt.__version__, time.perf_counter() - start)


def new_builder(trt: ModuleType, logger: Any, log: Log) -> Any:
    """TensorRT's builder. Raises `EngineError` where it cannot start."""
    # One that an error's traceback kept, say, is freed now: TensorRT-RTX calls the logger under a
    # lock that the end of a builder waits for, and Python may look for garbage in that call.
    gc.collect()
    try:
        return trt.Builder(logger)
    except Exception as error:  # the bindings raise RuntimeError or TypeError, as versions go
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot start on this machine: {error}\n"
            f"{explain(log.text())}\nSee what is there with hhdeploy doctor. TensorRT needs a GPU "
            "and its driver to build, TensorRT-RTX (`backend='tensorrt-rtx'`) does not."
        ) from error


def _network_flags(trt: ModuleType) -> int:
    """TensorRT 11 has strongly typed networks only, and may drop the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _profile(builder: Any, network: Any, shapes: Mapping[str, Shape]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name not in shapes:
            raise EngineError(
                f"the graph has an input {name!r}; expected {', '.join(shapes)}. Export the "
                "bundle again."
            )
        ranges = [dim if isinstance(dim, tuple) else (dim, dim, dim) for dim in shapes[name]]
        profile.set_shape(name, *zip(*ranges, strict=True))
    return profile


def _configure(trt: ModuleType, config: Any, options: BuildOptions, backend: TensorRt) -> None:
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.architectures:
        config.num_compute_capabilities = len(options.architectures)
    for index, name in enumerate(options.architectures):
        capability = getattr(trt.ComputeCapability, name.upper(), None)
        if capability is None:
            known = [n.lower() for n in dir(trt.ComputeCapability) if n.startswith("SM")]
            raise PlanError(
                f"`architectures=[{name!r}]`: {backend} {trt.__version__} builds for "
                f"{', '.join(sorted(known, key=sm_number))}."
            )
        config.set_compute_capability(capability, index)


def _monitor(trt: ModuleType, progress: Phases) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Passes steps on; an exception (Ctrl-C) in Python cancels the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                progress(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            progress(phase_name, steps, steps)

    return Monitor()
