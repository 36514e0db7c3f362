"""``hhdeploy triton``: a bundle as a model of a Triton Inference Server repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.engines import stale
from hhdeploy.bundle.manifest import MANIFEST, EngineEntry
from hhdeploy.errors import BundleError, OptionError, PlanError, WriteError, require
from hhdeploy.exporters.triton import (
    ADAPTERS_FILE,
    BACKENDS,
    CONFIG_FILE,
    LABELS_FILE,
    MODEL_FILES,
    Backend,
    Serving,
    adapters_json,
    check_model_name,
    check_serving,
    config_pbtxt,
    labels_txt,
    requestable,
)
from hhdeploy.files.directories import Replaceable, atomic_directory
from hhdeploy.files.writing import write_bytes
from hhdeploy.packages.version import own_version

Progress = Callable[[str], None]
_VERSION = "1"
_DEFAULT_MAX_BATCH = 32


def _foreign(path: Path) -> str | None:
    """Why a directory is not a model that `write_triton_repository` wrote, or None."""
    weights = {f"{file}.data" for file in MODEL_FILES.values()}
    known = {CONFIG_FILE, LABELS_FILE, ADAPTERS_FILE}
    known |= {f"{_VERSION}/{file}" for file in {*MODEL_FILES.values(), *weights}}
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    if not {CONFIG_FILE, ADAPTERS_FILE} <= found:
        return f"it has no {CONFIG_FILE} with {ADAPTERS_FILE}"
    other = sorted(found - known)
    return f"it holds {', '.join(other[:3])}, which no such model has" if other else None


_MODEL = Replaceable("a model", _foreign)


@dataclass(frozen=True)
class TritonOptions:
    """What `write_triton_repository` is asked for.

    Attributes:
        name: of the model; None: the bundle's directory's.
        precision: of the graph or engine.
        backend: ``onnxruntime`` or ``tensorrt`` (an engine of the bundle).
        gpu_arch: ``sm89`` ...: which engine, if the bundle has several that fit.
        max_batch: see `Serving`; None: 32, or the most that the engine takes.
        preferred_batch, max_queue_delay_us, instances: see `Serving`.
        gpu: place instances on GPUs (True) or the CPU (False); None: GPUs if there are any.
    """

    name: str | None = None
    precision: str = "float32"
    backend: Backend = "onnxruntime"
    gpu_arch: str | None = None
    max_batch: int | None = None
    preferred_batch: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    instances: int = 1
    gpu: bool | None = None


@dataclass(frozen=True)
class TritonModel:
    """What was written.

    Attributes:
        repository: what ``tritonserver --model-repository`` takes.
        name: of the model.
        files: relative to the repository.
        rows: name -> row (``adapter_ids``), None in a folded bundle.
        input_size: (3, H, W) of ``images``.
        unverified: adapters that were never compared with the training-time model.
        engine: that was copied, None with the ``onnxruntime`` backend.
    """

    repository: Path
    name: str
    files: tuple[str, ...]
    rows: dict[str, int | None]
    input_size: tuple[int, int, int]
    unverified: tuple[str, ...]
    engine: EngineEntry | None


def write_triton_repository(
    path: str | Path,
    out: str | Path,
    options: TritonOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = lambda step: None,
) -> TritonModel:
    """Write OUT/NAME/: config.pbtxt, labels.txt, adapters.json and version 1 of the model.

    The bank as it is now is baked into the graph (ids outside its rows give NaN logits): after
    ``adapter add`` or ``remove`` write the model again. Other models of an OUT that exists
    already stay as they are; the model itself is replaced whole, or not at all.

    Args:
        path: the bundle.
        out: the repository; made if it does not exist.
        options: see `TritonOptions`.
        overwrite: replace a model of the same name.
        progress: called with a few words at each step.

    Raises:
        BundleError: no adapter, no such graph, no engine that Triton can run (stale, another
            bank, the bank as an input, built by TensorRT-RTX), or a damaged file.
        PlanError: options that do not go together.
        MissingDependencyError: the ``onnxruntime`` backend needs the ``export`` extra here
            (onnx_ir, no torch).
        WriteError: OUT/NAME exists, or the file system refused.
    """
    options, out = options or TritonOptions(), Path(out)
    _check(options)
    bundle = Bundle.open(path)
    name = check_model_name(options.name or bundle.path.resolve().name)
    engine = _engine(bundle, options) if options.backend == "tensorrt" else None
    serving = _serving(options, engine)
    if not requestable(bundle.manifest):
        raise BundleError(
            f"{bundle.path} has no adapter to serve. Add one with: hhdeploy adapter add "
            f"{bundle.path} NAME=DIR"
        )
    if (out / MANIFEST).is_file():
        raise WriteError(f"{out} is a bundle. Choose another directory for the repository.")
    # A new repository appears whole; in one that exists, the model does.
    target = out / name if out.is_dir() else out
    with atomic_directory(target, overwrite=overwrite, kind=_MODEL) as scratch:
        root = scratch if target != out else scratch / name
        version = root / _VERSION
        version.mkdir(parents=True)
        if engine is not None:
            progress(f"copying {engine.file}")
            write_bytes(version / MODEL_FILES["tensorrt"], bundle.read(engine.file))
        else:
            _write_graph(bundle, options.precision, version / MODEL_FILES["onnxruntime"], progress)
        progress("writing the configuration")
        _write_texts(bundle, root, name, options, serving, engine)
        files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    manifest = bundle.manifest
    return TritonModel(
        out,
        name,
        tuple(f"{name}/{file.as_posix()}" for file in files),
        {entry.name: entry.row for entry in requestable(manifest)},
        manifest.input_size,
        tuple(a.name for a in manifest.adapters if not a.verified),
        engine,
    )


def _check(options: TritonOptions) -> None:
    """What no bundle could make right."""
    if options.name is not None:
        check_model_name(options.name)
    if options.backend not in BACKENDS:
        raise OptionError(
            f"--backend {options.backend}: expected {' or '.join(BACKENDS)}. (Triton's tensorrt "
            "backend runs TensorRT's engines, not TensorRT-RTX's.)"
        )
    cpu = options.gpu is False
    if options.backend == "tensorrt":
        if cpu:
            raise OptionError(
                "--cpu: TensorRT engines run on GPUs alone. Use --backend onnxruntime."
            )
        return
    if options.gpu_arch is not None:
        raise OptionError("--gpu-arch chooses an engine: it goes with --backend tensorrt alone.")
    if cpu and options.precision == "bfloat16":
        raise OptionError(
            "--cpu: ONNX Runtime has no bfloat16 kernels on CPUs, so the model would not load. "
            "Use --precision float32, or --gpu."
        )
    _serving(options, None)


def _serving(options: TritonOptions, engine: EngineEntry | None) -> Serving:
    """How Triton is to batch, within what the engine takes."""
    most = engine.batch[2] if engine is not None else None
    serving = Serving(
        max_batch=options.max_batch
        if options.max_batch is not None
        else most or _DEFAULT_MAX_BATCH,
        preferred_batch=options.preferred_batch,
        max_queue_delay_us=options.max_queue_delay_us,
        instances=options.instances,
        kind="auto" if options.gpu is None else "gpu" if options.gpu else "cpu",
    )
    check_serving(serving)
    if engine is None:
        return serving
    assert most is not None
    if serving.max_batch > most:
        raise PlanError(
            f"--max-batch {serving.max_batch}: {engine.file} takes {most} images at most. Use "
            f"--max-batch {most} or less, or build it with --max-batch {serving.max_batch}."
        )
    return replace(serving, kind="gpu")


def _engine(bundle: Bundle, options: TritonOptions) -> EngineEntry:
    """The engine that Triton's tensorrt backend can run, its file not read yet."""
    manifest, precision = bundle.manifest, options.precision
    constant = manifest.layout is not None and not manifest.bank_as_constant
    command = (
        f"hhdeploy build {bundle.path} --backend tensorrt --precision {precision}"
        f"{' --bank-as-constant' if constant else ''}"
    )
    entries = [e for e in manifest.engines if e.precision == precision]
    reasons = {e.file: _unfit(bundle, e, options.gpu_arch) for e in entries}
    fit = [e for e in entries if reasons[e.file] is None]
    if not fit:
        listed = "".join(f"\n  {file}: {reason}" for file, reason in reasons.items()) or " none."
        raise BundleError(
            f"{bundle.path} has no {precision} engine that Triton can run; it has:{listed}\n"
            f"Build one with: {command}"
        )
    if len(fit) > 1:
        listed = "".join(
            f"\n  {e.file}: {', '.join(e.architectures) or 'Ampere and newer'}" for e in fit
        )
        raise PlanError(
            f"{bundle.path} has several {precision} engines that Triton can run; choose one with "
            f"--gpu-arch:{listed}"
        )
    return fit[0]


def _unfit(bundle: Bundle, entry: EngineEntry, gpu_arch: str | None) -> str | None:
    """Why Triton cannot run an engine, or None."""
    manifest = bundle.manifest
    if entry.backend != "tensorrt":
        return f"built by {entry.backend}, which Triton's tensorrt backend cannot run"
    if manifest.layout is not None and entry.bank_sha256 is None:
        return "takes the bank as an input, which Triton does not keep between requests"
    if reason := stale(manifest, entry):
        return f"stale: {reason}"
    if entry.batch[0] != 1:
        return (
            f"takes {entry.batch[0]} images at least, and Triton also runs single requests "
            "(build with --min-batch 1)"
        )
    if gpu_arch is not None and entry.architectures and gpu_arch not in entry.architectures:
        return f"built for {', '.join(entry.architectures)}, not for {gpu_arch}"
    return None


def _write_graph(bundle: Bundle, precision: str, target: Path, progress: Progress) -> None:
    """The graph, the bank in it, its weights beside it."""
    purpose = f"writing the {precision} graph for Triton"
    require("onnx", "export", purpose)
    ir = require("onnx_ir", "export", purpose)
    from hhdeploy.exporters.bake import baked
    from hhdeploy.exporters.writer import save_graph

    progress(f"writing the {precision} graph")
    manifest = bundle.manifest
    model = ir.load(bundle.graph(precision))
    if manifest.layout is not None and not manifest.bank_as_constant:
        model = baked(model, bundle.bank())
    save_graph(model, target)


def _write_texts(
    bundle: Bundle,
    root: Path,
    name: str,
    options: TritonOptions,
    serving: Serving,
    engine: EngineEntry | None,
) -> None:
    manifest = bundle.manifest
    facts = {
        "adapters": json.dumps({entry.name: entry.row for entry in requestable(manifest)}),
        "hhdeploy_version": own_version(),
        "precision": options.precision,
    }
    if engine is not None:
        # An engine loads in the TensorRT version that built it alone: what to look for first.
        facts["tensorrt_version"] = engine.version
        facts["gpu_architectures"] = ",".join(engine.architectures)
    texts = {
        CONFIG_FILE: config_pbtxt(name, manifest, options.backend, serving, facts),
        LABELS_FILE: labels_txt(manifest),
        ADAPTERS_FILE: json.dumps(adapters_json(name, manifest), indent=2) + "\n",
    }
    for file, text in texts.items():
        (root / file).write_text(text, encoding="utf-8", newline="\n")
