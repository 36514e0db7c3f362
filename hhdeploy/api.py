"""What the command line does, from Python: export = plan, build, write, verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE, check_adapter, check_name, check_sites
from hhdeploy.adapters.format import Adapter, load_adapter
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.engines import engines_of
from hhdeploy.bundle.manifest import (
    BANK_FILE,
    PARITY_FILE,
    REFERENCE_FILE,
    AdapterEntry,
    Manifest,
    write_manifest,
)
from hhdeploy.bundle.reading import read_bundle
from hhdeploy.bundle.store import BUNDLE, LOCK_TIMEOUT, Basis, Change, edit, locked
from hhdeploy.errors import BundleError, OptionError, ParityError, PlanError, require
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.scratch import scratch_directory
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.files.writing import json_bytes, sha256_of, write_json
from hhdeploy.overflow import find_overflow
from hhdeploy.parity import ParityReport, StageResult, compare, stage_of
from hhdeploy.plan import Reserve, plan_branches
from hhdeploy.trt import BACKENDS

if TYPE_CHECKING:
    from hhdeploy.backbones.timm import Backbone
    from hhdeploy.exporters.trace import BaseGraph
    from hhdeploy.exporters.writer import Contents
    from hhdeploy.reference import Reference, VerifyData

Progress = Callable[[str], None]
_VERIFY_BATCH = 8
# Graphs that need no calibration data.
_UNCALIBRATED = ("float32", "float16", "bfloat16")
_NO_RESERVE = Reserve()


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        path: the bundle.
        manifest: its manifest.
        parity: the verification, None with ``verify=False``.
    """

    path: Path
    manifest: Manifest
    parity: ParityReport | None


def export(
    model: str,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    fold: bool = False,
    model_args: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    reserve: Reserve = _NO_RESERVE,
    bank_as_constant: bool = False,
    precisions: Sequence[str] = (),
    verify: bool = True,
    verify_data: str | Path | None = None,
    verify_images: int = 4,
    cache: str | Path | None = "default",
    overwrite: bool = False,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> ExportResult:
    """Export adapters of one backbone as a bundle, and verify it.

    Args:
        model: timm name, with or without ``.tag``.
        adapters: name -> adapter directory.
        out: the bundle's directory; written whole or not at all.
        fold: put the one adapter into the weights; else all become side branches.
        model_args: further arguments of ``timm.create_model``; None takes the adapters'.
        checkpoint: the backbone's weights; None takes timm's pretrained ones.
        pretrained: False uses random weights (``seed``): for benchmarks.
        reserve: room for adapters that come later (side branches).
        bank_as_constant: bake the bank into the graph.
        precisions: further graphs to write, e.g. ``["float16"]``.
        verify: compare with the training-time model; a failure leaves no bundle, but where a
            typed graph's values leave the range of its type: the bundle is written without it.
        verify_data: folder of images to verify on; None: seeded noise, which parity.json says.
        verify_images: images per adapter.
        cache: directory of traced backbones; "default": see ``default_cache``; None: no cache.
        overwrite: replace an existing bundle once the new one is complete; anything else that is
            there is refused.
        lock_timeout: seconds to wait, then, for whoever is changing the existing bundle.
        progress: called with a few words at each step.

    Raises:
        AdapterError, BackboneError, PlanError, WriteError: see their docstrings.
        ParityError: outputs differ from the training-time model by more than the table allows,
            or a graph overflows and was left out.
    """
    for package in ("onnx", "onnx_ir"):
        require(package, "export", "exporting")
    from hhdeploy.backbones.timm import BackboneSpec, load_backbone
    from hhdeploy.exporters.trace import base_graph, default_cache
    from hhdeploy.exporters.writer import write_bundle
    from hhdeploy.reference import VerifyData

    _check_precisions(precisions)
    if fold:
        _check_fold(len(adapters), reserve, bank_as_constant)
    kind = replace(BUNDLE, locked=partial(locked, lock_timeout=lock_timeout, progress=progress))
    with atomic_directory(Path(out), overwrite=overwrite, kind=kind) as scratch:
        progress("reading adapters")
        loaded = {check_name(name): load_adapter(path) for name, path in adapters.items()}
        spec = BackboneSpec(
            model,
            _model_args(model_args, loaded),
            Path(checkpoint) if checkpoint else None,
            pretrained,
            seed,
        )
        progress(f"loading {model}")
        backbone = load_backbone(spec)
        check_sites(backbone.facts)
        progress("tracing the backbone (cached for the next export)")
        where = default_cache() if cache == "default" else cache
        base = base_graph(backbone, Path(where) if where else None)
        progress("folding" if fold else "adding side branches")
        contents = _contents(base, loaded, fold, reserve, bank_as_constant, precisions)
        data = VerifyData(Path(verify_data) if verify_data else None, verify_images, seed)
        reference = _reference_of(backbone, contents, data, progress) if verify else None
        progress("writing graphs")
        manifest = write_bundle(scratch, contents, precisions, reference)
        report = found = None
        if verify:
            del contents, base, backbone, reference  # a session needs the memory more
            progress("verifying against the training-time model")
            found = _verified(Bundle(scratch, manifest), data)
            report = found.without(found.overflowed)
            kept = _without_graphs(Bundle(scratch, manifest), found.overflowed)
            manifest = _store_report(kept, report)
    if found is not None and found.overflowed:
        raise _overflow_error(Path(out), found)
    return ExportResult(Path(out), manifest, report)


def verify(
    path: str | Path, *, device: str = "cpu", precisions: Sequence[str] | None = None
) -> ParityReport:
    """Compare a bundle with the reference it carries, and its files with their hashes.

    float32 needs no torch.

    Args:
        path: the bundle.
        device: see ``open_session``; ``auto`` is judged by what it means here.
        precisions: graphs to check, None: all. One that is not float32 is checked through its
            rounding twin, which needs the ``export`` extra (onnx_ir), not torch.

    Returns:
        The report; the caller decides what a failure means (``report.passed``).

    Raises:
        BundleError: no bundle, no reference, or a file that was changed.
    """
    return read_bundle(path, lambda bundle: _verify(bundle, device, precisions))


def _verify(bundle: Bundle, device: str, precisions: Sequence[str] | None) -> ParityReport:
    bundle.check_files()
    if not bundle.manifest.has(REFERENCE_FILE):
        raise BundleError(
            f"{bundle.path} was exported without verification and carries no reference. Run: "
            "hhdeploy verify --against-torch"
        )
    return verify_graphs(bundle, device, precisions)


def verify_against_torch(
    path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    verify_data: str | Path | None = None,
    verify_images: int = 4,
    device: str = "cpu",
    precisions: Sequence[str] | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> ParityReport:
    """Recompute the reference with torch, adapters added later included, and verify.

    On success the bundle gets the new reference and report, and all its adapters count as
    verified but those that others added or replaced meanwhile; on failure it stays as it was. So
    it does where ``precisions`` (graphs to check, None: all) leaves out float32: the other graphs'
    bounds are too wide to vouch for an adapter.

    Raises:
        BackboneError: the weights are not the ones that the bundle was exported from.
        BundleError: a file of the bundle is damaged.
        ConflictError: the bundle was exported again meanwhile.
        ParityError: outputs differ by more than the table allows.
    """
    from hhdeploy.backbones.timm import BackboneSpec, load_backbone
    from hhdeploy.errors import BackboneError
    from hhdeploy.reference import VerifyData, training_time_reference

    bundle = read_bundle(path, _held)
    facts = bundle.manifest.backbone
    spec = BackboneSpec(
        facts["model"],
        facts["args"],
        Path(checkpoint) if checkpoint else None,
        pretrained,
        seed,
    )
    backbone = load_backbone(spec)
    if backbone.facts.sha256 != facts["sha256"]:
        raise BackboneError(
            f"{path} was exported from the weights {facts['sha256'][:12]}…, these are "
            f"{backbone.facts.sha256[:12]}…. Pass the same file with --checkpoint."
        )
    adapters = {a.name: bundle.load_adapter(a.name) for a in bundle.manifest.adapters}
    data = VerifyData(Path(verify_data) if verify_data else None, verify_images, seed)
    rows = _rows(bundle.manifest, adapters)
    reference = training_time_reference(backbone, rows, data, bundle.manifest.classes)
    report = verify_graphs(bundle, device, precisions, reference, data)
    if not report.passed:
        raise parity_error(report)
    if precisions is not None and "float32" not in precisions:
        return report
    basis = Basis.of(bundle.manifest)
    with edit(path, basis, lock_timeout=lock_timeout, progress=progress) as change:
        _store_verification(change, basis, reference, report)
    return report


def _held(bundle: Bundle) -> Bundle:
    bundle.check_files()
    return bundle.hold()


def _store_verification(
    change: Change, basis: Basis, reference: Reference, report: ParityReport
) -> None:
    """What was verified and is still there: reference, report, and the adapters' marks."""
    manifest = change.manifest
    adapters, graphs = basis.kept_adapters(manifest), basis.kept_graphs(manifest)
    rows = [0, *(basis.adapters[name][0] or 0 for name in adapters)]
    change.store(REFERENCE_FILE, tensor_bytes(reference.of_rows(rows).tensors()))
    stages = [
        s.to_json()
        for s in report.stages
        if s.adapter in {*adapters, BACKBONE} and s.precision in graphs
    ]
    # Of graphs that others added or replaced meanwhile.
    if manifest.has(PARITY_FILE):
        stages += [s for s in change.bundle.parity()["stages"] if s["precision"] not in graphs]
    change.store(PARITY_FILE, json_bytes({**report.to_json(), "stages": stages}))
    marked = tuple(replace(a, verified=a.verified or a.name in adapters) for a in manifest.adapters)
    change.manifest = replace(change.manifest, adapters=marked)


def _model_args(
    given: Mapping[str, Any] | None, adapters: Mapping[str, Adapter]
) -> Mapping[str, Any]:
    """The arguments given, else the ones that all adapters agree on."""
    if given is not None:
        return given
    named = {name: dict(a.config.base_model_args) for name, a in adapters.items()}
    distinct = list({str(sorted(args.items())): args for args in named.values()}.values())
    if len(distinct) > 1:
        raise PlanError(
            "the adapters disagree on base_model_args: "
            + "; ".join(f"{name}: {args}" for name, args in named.items())
            + ". Adapters of one bundle share the backbone; to overrule, pass --model-args."
        )
    return distinct[0] if distinct else {}


def _check_precisions(precisions: Sequence[str]) -> None:
    from hhdeploy.exporters.precision import PRECISIONS

    for precision in precisions:
        if precision not in PRECISIONS:
            raise OptionError(
                f"--precision {precision}: expected one of {', '.join(PRECISIONS)}. (float32 is "
                "always written; int8 comes from calibration data: hhdeploy calibrate.)"
            )


def _check_fold(adapters: int, reserve: Reserve, bank_as_constant: bool) -> None:
    if adapters != 1:
        raise OptionError(f"--fold takes exactly one adapter, found {adapters}.")
    if reserve != Reserve() or bank_as_constant:
        raise OptionError(
            "--fold cannot be combined with --max-rank, --max-classes, --sites, "
            "--keep-backbone-head or --bank-as-constant: a folded graph has no bank."
        )


def _contents(
    base: BaseGraph,
    adapters: Mapping[str, Adapter],
    fold: bool,
    reserve: Reserve,
    bank_as_constant: bool,
    precisions: Sequence[str],
) -> Contents:
    from hhdeploy.exporters.writer import branches_contents, folded_contents

    if not fold:
        plan = plan_branches(base.facts, adapters, reserve)
        return branches_contents(
            base, plan, adapters, bank_as_constant=bank_as_constant, precisions=precisions
        )
    ((name, adapter),) = adapters.items()
    check_adapter(name, adapter, base.facts)
    return folded_contents(base, name, adapter)


def _rows(
    manifest: Manifest, adapters: Mapping[str, Adapter]
) -> dict[str, tuple[int, Adapter | None]]:
    """Name -> (row, adapter) of everything a request can ask for, the backbone included."""
    rows: dict[str, tuple[int, Adapter | None]] = {}
    if manifest.backbone_classes:
        rows[BACKBONE] = (0, None)
    for entry in manifest.adapters:
        rows[entry.name] = (entry.row or 0, adapters[entry.name])
    return rows


def _reference_of(
    backbone: Backbone, contents: Contents, data: VerifyData, progress: Progress
) -> Callable[[], Reference]:
    from hhdeploy.reference import training_time_reference

    def compute() -> Reference:
        progress("running the training-time model in float64")
        rows = _rows(contents.manifest, contents.adapters)
        return training_time_reference(backbone, rows, data, contents.manifest.classes)

    return compute


def _verified(bundle: Bundle, data: VerifyData) -> ParityReport:
    from hhdeploy.reference import Reference

    report = verify_graphs(bundle, "cpu", None, Reference(*bundle.reference()), data)
    if not report.without(report.overflowed).passed:
        raise parity_error(report)
    return report


def _without_graphs(bundle: Bundle, precisions: Sequence[str]) -> Bundle:
    """A new bundle, some graphs of it deleted."""
    manifest = bundle.manifest
    gone = {f for p in precisions for f in (manifest.graphs[p], f"{manifest.graphs[p]}.data")}
    for name in gone:
        (bundle.path / name).unlink(missing_ok=True)
    graphs = {p: name for p, name in manifest.graphs.items() if p not in precisions}
    files = {name: digest for name, digest in manifest.files.items() if name not in gone}
    return Bundle(bundle.path, replace(manifest, graphs=graphs, files=files))


def _overflow_error(out: Path, report: ParityReport) -> ParityError:
    kept = ", ".join(dict.fromkeys(s.precision for s in report.without(report.overflowed).stages))
    return ParityError(
        f"{' and '.join(report.overflowed)} cannot hold the values of this model:\n"
        f"{report.explain_failures()}\n{out} was written without it and is good: it has {kept}, "
        "verified."
    )


def parity_error(report: ParityReport) -> ParityError:
    """What failed, in words; a type's overflow is no fault to report."""
    known = all(s.overflow for s in report.stages if s.failures)
    return ParityError(
        "the outputs differ from the training-time model by more than the parity table allows:\n"
        f"{report.explain_failures()}\nNo bundle was written or changed."
        f"{'' if known else ' Please report this with the name of the model.'}"
    )


def verify_graphs(
    bundle: Bundle,
    device: str,
    precisions: Sequence[str] | None,
    reference: Reference | None = None,
    data: VerifyData | None = None,
) -> ParityReport:
    """Run every graph on the reference's images, in batches that mix adapters."""
    if reference is None:
        images, ids, logits = bundle.reference()
    else:
        images, ids, logits = reference.images, reference.adapter_ids, reference.logits
    names = _names(bundle.manifest, added_later=reference is not None)
    # Rows of adapters that were removed since, or replaced by one that is not in the reference.
    known = np.isin(ids, list(names.values()))
    images, ids, logits = images[known], ids[known], logits[known]
    if not len(images):
        raise BundleError(
            f"{bundle.path}: nothing to verify: none of its adapters is in the reference. Run: "
            "hhdeploy verify --against-torch"
        )
    stages: list[StageResult] = []
    for precision in precisions or _default_precisions(bundle, device):
        really = _really(bundle.manifest, device, precision)
        stage = stage_of(bundle.manifest.kind, really, precision)
        with scratch_directory(None, "twin") as scratch:
            twin = _twin(bundle, precision, scratch) if stage == "twin" else None
            found, runtime = _logits(
                twin or bundle, really, "float32" if twin else precision, images, ids, names
            )
            for name, row in names.items():
                own = ids == row
                comparison = compare(logits[own], found[own])
                overflow = ""
                if twin is not None and not np.isfinite(comparison.max_abs):
                    overflow = find_overflow(twin, precision, images[own], ids[own])
                stages.append(StageResult.of(stage, precision, runtime, name, comparison, overflow))
    described = data.to_json() if data is not None else bundle.parity()["data"]
    return ParityReport(described, stages)


def _default_precisions(bundle: Bundle, device: str) -> tuple[str, ...]:
    """All that the device can show: graphs, or engines. Graphs that came from calibration were
    judged on real images then; on noise, far outside their ranges, they would prove nothing."""
    if device in BACKENDS:
        engines = [e for e in engines_of(bundle.manifest) if e.backend == device]
        return tuple(dict.fromkeys(e.precision for e in engines))
    graphs = tuple(bundle.manifest.graphs)
    if device == "openvino":
        from hhdeploy.runtime.openvino_backend import computes_bfloat16

        graphs = tuple(p for p in graphs if p != "bfloat16" or computes_bfloat16())
    if bundle.manifest.has(PARITY_FILE) and bundle.parity()["data"].get("kind") == "noise":
        return tuple(p for p in graphs if p in _UNCALIBRATED)
    return graphs


def _really(manifest: Manifest, device: str, precision: str) -> str:
    """What ``auto`` means here for a precision; another device is what it says."""
    if device != "auto":
        return device
    from hhdeploy.runtime.backends import find_target
    from hhdeploy.runtime.openvino_backend import computes_bfloat16

    found = find_target(manifest, device, precision).device
    if found == "openvino" and precision == "bfloat16" and not computes_bfloat16():
        return "cpu"  # no session computes it here; its graph is shown by its rounding twin
    return found


def _names(manifest: Manifest, *, added_later: bool) -> dict[str, int]:
    """Name -> row of what the reference covers: adapters added later only if it is new."""
    rows = {BACKBONE: 0} if manifest.backbone_classes else {}
    return rows | {a.name: a.row or 0 for a in manifest.adapters if a.verified or added_later}


def _logits(
    bundle: Bundle,
    device: str,
    precision: str,
    images: NDArray[np.float32],
    ids: NDArray[np.int64],
    names: Mapping[str, int],
) -> tuple[NDArray[np.float32], str]:
    from hhdeploy.runtime.session import open_bundle

    by_row: dict[int, str | None] = {row: name for name, row in names.items()}
    with open_bundle(bundle, device=device, precision=precision) as session:
        batches = [
            session.run(
                images[i : i + _VERIFY_BATCH], [by_row[int(r)] for r in ids[i : i + _VERIFY_BATCH]]
            )
            for i in range(0, len(images), _VERIFY_BATCH)
        ]
        return np.concatenate(batches), session.device


def _twin(bundle: Bundle, precision: str, path: Path) -> Bundle:
    """A bundle whose float32 graph is the rounding twin of a typed graph."""
    for package in ("onnx", "onnx_ir"):
        require(package, "export", f"verifying a {precision} graph (by its rounding twin)")
    import onnx_ir as ir

    from hhdeploy.exporters.precision import rounding_twin
    from hhdeploy.exporters.writer import save_graph

    bundle.graph(precision)  # it must be there, and be what was exported
    twin = rounding_twin(ir.load(bundle.graph("float32")), precision)
    save_graph(twin, path / "twin.onnx")
    files = {name: sha256_of(path / name) for name in ("twin.onnx", "twin.onnx.data")}
    held = {}
    if bundle.manifest.layout is not None:
        name = bundle.manifest.named(BANK_FILE)
        held[name], files[name] = bundle.read(name), bundle.manifest.files[name]
    manifest = replace(bundle.manifest, graphs={"float32": "twin.onnx"}, files=files)
    return Bundle(path, manifest, held)


def _store_report(bundle: Bundle, report: ParityReport) -> Manifest:
    """Write the report of a new bundle, and mark its adapters verified."""
    write_json(bundle.path / PARITY_FILE, report.to_json())
    adapters: tuple[AdapterEntry, ...] = tuple(
        replace(a, verified=True) for a in bundle.manifest.adapters
    )
    files = dict(bundle.manifest.files)
    for name in (PARITY_FILE, REFERENCE_FILE):
        files[name] = sha256_of(bundle.path / name)
    manifest = replace(bundle.manifest, adapters=adapters, files=files)
    write_manifest(bundle.path, manifest)
    return manifest
