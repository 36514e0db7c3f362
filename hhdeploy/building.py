"""``hhdeploy build``: a bundle's graph, compiled to an engine that the manifest knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.engines import engine_name, stale
from hhdeploy.bundle.locking import check_changeable, left_alone
from hhdeploy.bundle.manifest import BANK_FILE, EngineEntry, Range, name_with_digits, plain_name
from hhdeploy.bundle.store import LOCK_TIMEOUT, Basis, Change, Progress, edit
from hhdeploy.choices import (
    BACKENDS,
    PRECISIONS,
    Precision,
    TensorRt,
    listener,
    one_of,
    options_of,
    seconds,
)
from hhdeploy.errors import ConflictError, PlanError, require
from hhdeploy.exporters.engine import (
    BuildOptions,
    Phases,
    Shape,
    check_build_options,
    engine_from_onnx,
)
from hhdeploy.files.writing import sha256_of_bytes, temporary_directory
from hhdeploy.packages import import_tensorrt

__all__ = ["BuildOptions", "build"]

_DEFAULT_MAX_SLOTS = 1024
# Elements of one tensor, at most, in many layers of TensorRT.
_ELEMENT_LIMIT = 2**31 - 1


def build(
    path: str | Path,
    *,
    backend: TensorRt,
    precision: Precision = "float32",
    options: BuildOptions | None = None,
    progress: Progress = lambda step: None,
    phases: Phases = lambda phase, done, steps: None,
    lock_timeout: float = LOCK_TIMEOUT,
) -> EngineEntry:
    """Compile one graph of a bundle and enter the engine in the manifest.

    A float16 or bfloat16 graph that is missing is made and verified first (needs the ``export``
    extra, no torch). Otherwise NumPy and the backend are enough.

    Args:
        path: the bundle.
        backend: ``tensorrt`` (needs a GPU) or ``tensorrt-rtx`` (does not).
        precision: of the graph.
        options: profile and flags.
        progress: called with a few words at each step.
        phases: called with the compiler's own progress.
        lock_timeout: see `hhdeploy.bundle.store.edit`.

    Raises:
        OptionError: no such backend or precision anywhere.
        PlanError: options that do not go together, with this graph or this backend.
        EngineError: TensorRT refused.
        ConflictError: graph or bank of the engine were replaced meanwhile.
        BundleError, WriteError: see their docstrings; the bundle is unchanged then.
    """
    progress = listener(progress)
    backend, precision = (
        one_of(BACKENDS, backend, "backend"),
        one_of(PRECISIONS, precision, "precision"),
    )
    seconds(lock_timeout, "lock_timeout")  # not after the build
    options = options_of(options, BuildOptions, "options")
    check_build_options(backend, precision, options)
    import_tensorrt(backend)  # before anything slow
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    manifest.check_logits_alone("an engine")
    baked_in = manifest.bank_as_constant or options.bank_as_constant
    slots = _slots(bundle, options)
    check_changeable(bundle.path)
    architectures = options.architectures
    gpu = None
    if backend == "tensorrt":
        from hhdeploy.runtime.cuda import find_gpu

        here = find_gpu()
        gpu = here.name
        architectures = () if options.hardware_compatible else (here.architecture,)
    if precision not in manifest.graphs:
        from hhdeploy.verifying.graphs import add_typed_graph

        bundle = add_typed_graph(path, precision, lock_timeout=lock_timeout, progress=progress)
        manifest = bundle.manifest
    graph = bundle.graph(precision)
    shapes: dict[str, Shape] = {"images": (options.batch, *manifest.input_size)}
    if manifest.layout is not None:
        shapes["adapter_ids"] = (options.batch,)
    if manifest.layout is not None and slots is not None:
        shapes["adapter_bank"] = (slots, manifest.layout.size)
    progress(f"building with {backend}")
    with left_alone(bundle), temporary_directory("build") as scratch:
        if options.bank_as_constant:
            graph = _baked(bundle, graph, scratch)
        built = engine_from_onnx(graph, backend, shapes, options, phases)
    name = engine_name(precision, backend, architectures, bank_as_constant=baked_in)
    plan = memoryview(built.plan)
    entry = EngineEntry(
        file=name_with_digits(name, sha256_of_bytes(plan)),
        backend=backend,
        version=built.version,
        precision=precision,
        architectures=architectures,
        gpu=gpu,
        batch=options.batch,
        slots=slots,
        bank_sha256=manifest.files[manifest.named(BANK_FILE)] if baked_in else None,
        graph_sha256=manifest.graph_digest(precision),
        optimization_level=options.optimization_level,
        build_seconds=round(built.seconds, 3),
        bytes=plan.nbytes,
    )
    with edit(path, Basis.of(manifest), lock_timeout=lock_timeout, progress=progress) as change:
        _enter(change, name, entry, plan)
    return entry


def _slots(bundle: Bundle, options: BuildOptions) -> Range | None:
    """Rows of the engine's bank; None without one."""
    manifest = bundle.manifest
    if options.bank_as_constant and manifest.layout is None:
        raise PlanError("`bank_as_constant`: a folded bundle has no bank. Leave it out.")
    if manifest.layout is None or manifest.bank_as_constant or options.bank_as_constant:
        if options.max_slots is not None:
            raise PlanError(
                "`max_slots`: this engine has no bank input (a folded graph, or a bank baked "
                "in). Leave it out."
            )
        return None
    rows, row = len(bundle.bank()), manifest.layout.size
    limit = _ELEMENT_LIMIT // row
    most = options.max_slots
    if most is None:
        most = max(rows, min(_DEFAULT_MAX_SLOTS, limit))
    if most > limit:
        raise PlanError(
            f"`max_slots={most}`: a bank of that many rows of {row:,} floats has {most * row:,} "
            f"elements, TensorRT takes {_ELEMENT_LIMIT:,} a tensor. Use `max_slots={limit}` or "
            "fewer."
        )
    if most < rows:
        raise PlanError(
            f"`max_slots={most}`: the bundle's bank has {rows} rows. Use {rows} or more."
        )
    return 1, rows, most


def _baked(bundle: Bundle, graph: Path, scratch: Path) -> Path:
    """The graph with the bundle's bank in it, in a scratch directory."""
    require("onnx_ir", "export", "baking the bank into an engine")
    from hhdeploy.exporters.bake import baked
    from hhdeploy.exporters.writer import save_graph
    from hhdeploy.graph import open_graph

    target = scratch / graph.name
    save_graph(baked(open_graph(graph), bundle.bank()), target)
    return target


def _enter(change: Change, name: str, entry: EngineEntry, plan: memoryview) -> None:
    """The engine in the place of one of the same name, if it is still the bundle's."""
    if reason := stale(change.manifest, entry):
        raise ConflictError(
            f"{change.bundle.path} was changed while the engine was built: {reason}. Nothing was "
            "written. Build it again."
        )
    change.store(name, plan)
    others = [e for e in change.manifest.engines if plain_name(e.file) != name]
    change.manifest = replace(change.manifest, engines=(*others, entry))
