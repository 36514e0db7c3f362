"""Graphs of further precisions, added to a bundle that exists: verified, whole, or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from hhdeploy.api import Progress, parity_error, verify_graphs
from hhdeploy.bundle import (
    PARITY_FILE,
    REFERENCE_FILE,
    Bundle,
    Manifest,
    graph_hint,
    write_manifest,
)
from hhdeploy.errors import PlanError, require
from hhdeploy.files import os_errors, sha256_of, write_json
from hhdeploy.parity import ParityReport, StageResult
from hhdeploy.rows import check_row_range

# Writes a graph to the path given, its weights to <path>.data.
Save = Callable[[Path], None]
# Judges the graph of a bundle that is not committed yet.
Judge = Callable[[Bundle], Sequence[StageResult]]


def add_typed_graph(
    path: str | Path, precision: str, *, progress: Progress = lambda step: None
) -> Bundle:
    """Add the float16 or bfloat16 graph to a bundle, verified by its rounding twin. No torch.

    A bundle that was exported without a reference gets the graph unverified.

    Raises:
        PlanError: the precision needs calibration data, or an adapter's values do not fit it.
        ParityError: the twin differs from the reference by more than the table allows.
        MissingDependencyError: needs the ``export`` extra (onnx_ir).
    """
    bundle = Bundle.open(path)
    purpose = f"making the {precision} graph of {path}"
    require("onnx", "export", purpose)
    ir = require("onnx_ir", "export", purpose)
    from hhdeploy.exporters.precision import PRECISIONS, typed_model
    from hhdeploy.exporters.writer import save_graph

    if precision not in PRECISIONS:
        raise PlanError(
            f"{path} has no {precision} graph; it has {', '.join(bundle.manifest.graphs)}. "
            f"{' and '.join(PRECISIONS)} are made when they are missing, others are not. "
            f"{graph_hint(bundle.path, precision)}"
        )
    if bundle.manifest.layout is not None:
        bank = bundle.bank()
        for entry in bundle.manifest.adapters:
            check_row_range(entry.name, bank[entry.row], [precision])
    progress(f"making the {precision} graph")
    model = typed_model(ir.load(bundle.graph("float32")), precision)

    def judge(candidate: Bundle) -> Sequence[StageResult]:
        if REFERENCE_FILE not in candidate.manifest.files:
            return []
        progress("verifying it by its rounding twin")
        return verify_graphs(candidate, "cpu", [precision]).stages

    return add_graph(bundle, precision, lambda target: save_graph(model, target), judge)


def add_graph(
    bundle: Bundle,
    precision: str,
    save: Save,
    judge: Judge,
    extras: Mapping[str, Save] = MappingProxyType({}),
) -> Bundle:
    """Add a graph to a bundle, or replace the one of the same precision.

    The graph is judged in a scratch directory; files move into the bundle once it has passed,
    the manifest last. Engines of an older graph stay on disk and are refused when opened.

    Args:
        bundle: to be added to.
        precision: of the graph.
        save: writes it.
        judge: its parity.
        extras: further files that belong to the graph: name -> what writes it.

    Raises:
        ParityError: a stage failed; the bundle is unchanged.
        WriteError: the file system refused.
    """
    from hhdeploy.exporters.writer import graph_name

    name = graph_name(precision)
    names = (name, f"{name}.data", *extras)
    with (
        os_errors(bundle.path),
        tempfile.TemporaryDirectory(dir=bundle.path, prefix=".graph.") as folder,
    ):
        scratch = Path(folder)
        save(scratch / name)
        for extra, write in extras.items():
            write(scratch / extra)
        hashes = {n: sha256_of(scratch / n) for n in names}
        candidate = replace(
            bundle.manifest,
            graphs={**bundle.manifest.graphs, precision: f"{scratch.name}/{name}"},
            files={**bundle.manifest.files, **{f"{scratch.name}/{n}": hashes[n] for n in names}},
        )
        stages = judge(Bundle(bundle.path, candidate))
        report = ParityReport({}, stages)
        if stages and not report.passed:
            raise parity_error(report)
        for moved in names:
            os.replace(scratch / moved, bundle.path / moved)
    manifest = replace(
        bundle.manifest,
        graphs={**bundle.manifest.graphs, precision: name},
        files={**bundle.manifest.files, **hashes},
    )
    manifest = _with_stages(bundle, manifest, precision, stages)
    write_manifest(bundle.path, manifest)
    return Bundle(bundle.path, manifest)


def _with_stages(
    bundle: Bundle, manifest: Manifest, precision: str, stages: Sequence[StageResult]
) -> Manifest:
    """parity.json with the stages of one precision replaced."""
    if PARITY_FILE not in manifest.files:
        return manifest
    content = json.loads(bundle.file(PARITY_FILE).read_text(encoding="utf-8"))
    others = [s for s in content["stages"] if s["precision"] != precision]
    content["stages"] = others + [s.to_json() for s in stages]
    write_json(bundle.path / PARITY_FILE, content)
    files = {**manifest.files, PARITY_FILE: sha256_of(bundle.path / PARITY_FILE)}
    return replace(manifest, files=files)
