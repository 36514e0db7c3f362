"""``hhdeploy triton``: a bundle as a model of a Triton Inference Server repository."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.engines import stale
from hhdeploy.bundle.manifest import MANIFEST, EngineEntry
from hhdeploy.bundle.store import Progress
from hhdeploy.choices import Precision
from hhdeploy.errors import BundleError, PlanError, WriteError, as_code, require
from hhdeploy.exporters.triton import (
    ADAPTERS_FILE,
    CONFIG_FILE,
    LABELS_FILE,
    MODEL_FILES,
    TritonOptions,
    adapters_json,
    check_model_name,
    check_numbers,
    check_triton_options,
    config_pbtxt,
    labels_txt,
    requestable,
)
from hhdeploy.files.directories import Replaceable, atomic_directory
from hhdeploy.files.writing import write_bytes
from hhdeploy.packages import own_version

__all__ = ["TritonModel", "TritonOptions", "write_triton_repository"]

_VERSION = "1"


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
        PlanError: options that do not go together, or a bundle that gives more than logits.
        MissingDependencyError: the ``onnxruntime`` backend needs the ``export`` extra here
            (onnx_ir, no torch).
        WriteError: OUT/NAME exists, or the file system refused.
    """
    options, out = options or TritonOptions(), Path(out)
    check_triton_options(options)
    bundle = Bundle.open(path)
    bundle.manifest.check_logits_alone("a repository of Triton")
    name = check_model_name(options.name or bundle.path.resolve().name)
    engine = _engine(bundle, options) if options.backend == "tensorrt" else None
    if engine is not None:
        options = _for_engine(options, engine)
    if not requestable(bundle.manifest):
        raise BundleError(
            f"{bundle.path} has no adapter to serve. Add one with: "
            f"{as_code('add_adapter', bundle.path, 'NAME', 'DIR')}"
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
        _write_texts(bundle, root, name, options, engine)
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


def _for_engine(options: TritonOptions, engine: EngineEntry) -> TritonOptions:
    """The options within what the engine takes."""
    most = engine.batch[2]
    wanted = most if options.max_batch is None else options.max_batch
    fit = replace(options, max_batch=wanted, gpu=True)
    check_numbers(fit)
    if fit.batch > most:
        raise PlanError(
            f"`max_batch={fit.batch}`: {engine.file} takes {most} images at most. Use "
            f"`max_batch={most}` or less, or build it with a `batch[2]` of {fit.batch}."
        )
    return fit


def _engine(bundle: Bundle, options: TritonOptions) -> EngineEntry:
    """The engine that Triton's tensorrt backend can run, its file not read yet."""
    manifest, precision = bundle.manifest, options.precision
    constant = manifest.layout is not None and not manifest.bank_as_constant
    plain = as_code("build", bundle.path, backend="tensorrt", precision=precision)
    with_bank = as_code(
        "build",
        bundle.path,
        backend="tensorrt",
        precision=precision,
        options=as_code("BuildOptions", bank_as_constant=True),
    )
    command = with_bank if constant else plain
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
            f"`gpu_arch`:{listed}"
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
            "(build with a `batch[0]` of 1)"
        )
    if gpu_arch is not None and entry.architectures and gpu_arch not in entry.architectures:
        return f"built for {', '.join(entry.architectures)}, not for {gpu_arch}"
    return None


def _write_graph(bundle: Bundle, precision: Precision, target: Path, progress: Progress) -> None:
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
        CONFIG_FILE: config_pbtxt(name, manifest, options, facts),
        LABELS_FILE: labels_txt(manifest),
        ADAPTERS_FILE: json.dumps(adapters_json(name, manifest), indent=2) + "\n",
    }
    for file, text in texts.items():
        (root / file).write_text(text, encoding="utf-8", newline="\n")
