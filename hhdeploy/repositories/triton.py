"""``hhdeploy triton``: a bundle as a model of a Triton Inference Server repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.engines import stale
from hhdeploy.bundle.manifest import AdapterEntry, EngineEntry
from hhdeploy.bundle.store import Progress
from hhdeploy.choices import listener, options_of, yes_or_no
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
from hhdeploy.files.directories import (
    Replaceable,
    atomic_directory,
    check_target,
    remove_directory,
    strangers,
)
from hhdeploy.files.writing import as_path, is_folder, write_bytes
from hhdeploy.packages import own_version
from hhdeploy.repositories.graphs import (
    VERSION,
    ServedModel,
    open_servable,
    served_facts,
    write_graph,
)

__all__ = ["TritonModel", "TritonOptions", "write_triton_repository"]

# Writes a model into its directory.
_Writer = Callable[[Path], None]
# Beside an ensemble: the models of its first and its last step.
_STEPS = ("preprocess", "answer")
# A step in the configuration of an ensemble, as `triton_ensemble` writes it.
_RUNS = re.compile(r'^\s*model_name:\s"(.*)"$', re.MULTILINE)


def _foreign(path: Path) -> str | None:
    """Why a directory is not a model that `write_triton_repository` wrote, or None."""
    weights = {f"{file}.data" for file in MODEL_FILES.values()}
    known = {CONFIG_FILE, LABELS_FILE, ADAPTERS_FILE}
    known |= {f"{VERSION}/{file}" for file in {*MODEL_FILES.values(), *weights}}
    if not all((path / name).is_file() for name in (CONFIG_FILE, ADAPTERS_FILE)):
        return f"it has no {CONFIG_FILE} with {ADAPTERS_FILE}"
    return strangers(path, known, "no such model has")


_MODEL = Replaceable("a model", _foreign)


@dataclass(frozen=True)
class TritonModel(ServedModel):
    """What was written.

    Attributes:
        engine: that was copied, None with the ``onnxruntime`` backend.
        ensembles: adapter -> the model that takes pictures for it, with ``ensemble`` alone.
        removed: models of ensembles that ran the model that was replaced.
    """

    engine: EngineEntry | None
    ensembles: Mapping[str, str]
    removed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """See `ServedModel.to_json`."""
        return {
            **super().to_json(),
            "engine": self.engine.to_json() if self.engine is not None else None,
            "ensembles": dict(self.ensembles),
            "removed": list(self.removed),
        }


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

    With ``ensemble`` there is beside it, for each crop mode and filter that adapters have, an
    ensemble NAME_pictures and the models of its first and last step. Those of an earlier writing
    that are not written again are removed: they would run the new model, and have the rows and the
    names of the old one's adapters.

    Args:
        path: the bundle.
        out: the repository; made if it does not exist.
        options: see `TritonOptions`.
        overwrite: replace a model of the same name.
        progress: called with a few words at each step.

    Raises:
        BundleError: no adapter, no such graph, no engine that Triton can run (stale, another
            bank, the bank as an input, built by TensorRT-RTX), or a damaged file.
        PlanError: options that do not go together, a bundle that gives more than logits, or, for
            an ensemble, an adapter whose pictures no graph makes.
        MissingDependencyError: the ``onnxruntime`` backend and ensembles need the ``export`` extra
            here (onnx_ir, no torch).
        WriteError: OUT/NAME or an ensemble of it exists, or the file system refused.
    """
    progress = listener(progress)
    options, out = options_of(options, TritonOptions, "options"), as_path(out, "out")
    overwrite = yes_or_no(overwrite, "overwrite")
    check_triton_options(options)
    bundle = open_servable(path, out, "Triton")
    name = check_model_name(options.name or bundle.path.resolve().name)
    engine = _engine(bundle, options) if options.backend == "tensorrt" else None
    if engine is not None:
        options = _for_engine(options, engine)
    groups = _groups(bundle, name) if options.ensemble else {}
    ensembles = {entry.name: group for group, entries in groups.items() for entry in entries}
    models: dict[str, _Writer] = {
        name: partial(_write_model, bundle, name, options, engine, ensembles, progress)
    }
    for group, entries in groups.items():
        models |= _ensemble(bundle, name, group, entries, options)
    former = tuple(model for model in _around(out, name) if model not in models)
    files = _install(out, models, former, overwrite=overwrite)
    facts = served_facts(bundle.manifest)
    return TritonModel(
        out, name, files, **facts, engine=engine, ensembles=ensembles, removed=former
    )


def _around(out: Path, name: str) -> list[str]:
    """What earlier writings made for a model in a repository: ensembles that run it, their steps.

    An ensemble goes before its steps: while they are removed, nothing lacks a part.
    """
    found: list[str] = []
    if not is_folder(out, WriteError):
        return found
    for config in sorted(out.glob(f"*/{CONFIG_FILE}")):
        ensemble = config.parent.name
        if (config.parent / ADAPTERS_FILE).is_file() and name in _RUNS.findall(
            config.read_text(encoding="utf-8", errors="replace")
        ):
            steps = (f"{ensemble}_{step}" for step in _STEPS)
            found += [ensemble, *(step for step in steps if (out / step).is_dir())]
    return found


def _install(
    out: Path, models: Mapping[str, _Writer], former: Iterable[str], *, overwrite: bool
) -> tuple[str, ...]:
    """Write models into a repository and remove those of a ``former`` writing: the files, relative
    to it.

    A new repository appears whole. In one that exists each model does, an ensemble after those that
    it is made of.
    """
    files: list[str] = []
    if not is_folder(out, WriteError):
        with atomic_directory(out, overwrite=overwrite, kind=_MODEL) as scratch:
            for name, write in models.items():
                files += _written(scratch / name, name, write)
        return tuple(files)
    for name in (*models, *former):  # before any of them is replaced
        check_target(out / name, _MODEL, overwrite=overwrite)
    for name, write in models.items():
        with atomic_directory(out / name, overwrite=overwrite, kind=_MODEL) as scratch:
            files += _written(scratch, name, write)
    for name in former:
        remove_directory(out / name, _MODEL)
    return tuple(files)


def _written(root: Path, name: str, write: _Writer) -> list[str]:
    (root / VERSION).mkdir(parents=True)
    write(root)
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    return [f"{name}/{file.as_posix()}" for file in files]


def _groups(bundle: Bundle, name: str) -> dict[str, list[AdapterEntry]]:
    """Ensemble -> its adapters: those whose pictures the same graph makes."""
    manifest = bundle.manifest
    found: dict[str, list[AdapterEntry]] = {}
    for entry in requestable(manifest):
        role = entry.preprocess.graph_file
        if role is None or not manifest.has(role):
            raise PlanError(
                f"`ensemble=True`: {bundle.path} has no graph that makes {entry.name}'s input of "
                f"a picture ({entry.preprocess.described()}). Leave `ensemble` out, or export the "
                "bundle once more if an earlier version made it."
            )
        found.setdefault(role.removesuffix(".onnx").removeprefix("preprocess."), []).append(entry)
    if len(found) == 1:
        return {check_model_name(f"{name}_pictures"): entries for entries in found.values()}
    return {
        check_model_name(f"{name}_pictures_{way.replace('.', '_')}"): entries
        for way, entries in found.items()
    }


def _ensemble(
    bundle: Bundle, model: str, name: str, entries: list[AdapterEntry], options: TritonOptions
) -> dict[str, _Writer]:
    """The models of an ensemble by name, itself last."""
    onnx = require("onnx", "export", "writing an ensemble for Triton")
    from hhdeploy.exporters.portable.ensemble import answering, preprocessing
    from hhdeploy.exporters.portable.triton_ensemble import Ensemble

    manifest = bundle.manifest
    role = entries[0].preprocess.graph_file or ""
    graph = bundle.read(manifest.named(role))
    preprocess, answer = (check_model_name(f"{name}_{step}") for step in _STEPS)
    graphs = {
        preprocess: preprocessing(graph, entries),
        answer: answering(manifest.classes, entries, graph),
        name: None,
    }
    facts = _facts(entries, options)
    configs = Ensemble(name, preprocess, answer, model, manifest, facts).configs()
    adapters = adapters_json(name, manifest, dict.fromkeys((e.name for e in entries), name))

    def write(step: str, root: Path) -> None:
        if (proto := graphs[step]) is not None:  # an ensemble's version is empty
            onnx.save(proto, root / VERSION / MODEL_FILES["onnxruntime"])
        _write_texts(root, {CONFIG_FILE: configs[step], ADAPTERS_FILE: _json(adapters)})

    return {step: partial(write, step) for step in configs}


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


def _write_model(
    bundle: Bundle,
    name: str,
    options: TritonOptions,
    engine: EngineEntry | None,
    ensembles: Mapping[str, str],
    progress: Progress,
    root: Path,
) -> None:
    """The model that takes images: graph or engine, and its texts."""
    manifest, version = bundle.manifest, root / VERSION
    facts = _facts(requestable(manifest), options)
    if engine is not None:
        progress(f"copying {engine.file}")
        write_bytes(version / MODEL_FILES["tensorrt"], bundle.read(engine.file))
        # An engine loads in the TensorRT version that built it alone: what to look for first.
        facts["tensorrt_version"] = engine.version
        facts["gpu_architectures"] = ",".join(engine.architectures)
    else:
        graph = version / MODEL_FILES["onnxruntime"]
        write_graph(bundle, options.precision, graph, "Triton", progress)
    progress("writing the configuration")
    texts = {
        CONFIG_FILE: config_pbtxt(name, manifest, options, facts),
        LABELS_FILE: labels_txt(manifest),
        ADAPTERS_FILE: _json(adapters_json(name, manifest, ensembles)),
    }
    _write_texts(root, texts)


def _facts(entries: Iterable[AdapterEntry], options: TritonOptions) -> dict[str, str]:
    """What clients and operators can read from the server: ``parameters``."""
    return {
        "adapters": json.dumps({entry.name: entry.row for entry in entries}),
        "hhdeploy_version": own_version(),
        "precision": options.precision,
    }


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write_texts(root: Path, texts: Mapping[str, str]) -> None:
    for file, text in texts.items():
        (root / file).write_text(text, encoding="utf-8", newline="\n")
