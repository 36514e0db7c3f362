"""Graphs of further precisions, added to a bundle that exists: verified, whole, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.layout import check_row_range
from hhdeploy.bundle.manifest import PARITY_FILE, REFERENCE_FILE, name_with_digits
from hhdeploy.bundle.reading import graph_hint, read_bundle
from hhdeploy.bundle.rounding import check_row_survives
from hhdeploy.bundle.store import LOCK_TIMEOUT, Basis, Change, Progress, edit, work_directory
from hhdeploy.choices import TYPED, Precision, member
from hhdeploy.errors import PlanError, require
from hhdeploy.files.writing import json_bytes, os_errors, sha256_of, sha256_of_bytes, sync_tree
from hhdeploy.parity import ParityReport, StageResult
from hhdeploy.verifying.answers import parity_error, verify_graphs
from hhdeploy.verifying.survival import Effects, check_folded, say

# Writes a graph to the path given, its weights to <path>.data.
Save = Callable[[Path], None]
# Judges the graph of a bundle that is not committed yet.
Judge = Callable[[Bundle], Sequence[StageResult]]


def add_typed_graph(
    path: str | Path,
    precision: Precision,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Add the float16 or bfloat16 graph to a bundle, verified by its rounding twin. No torch.

    A bundle that was exported without a reference gets the graph unverified.

    Raises:
        PlanError: the precision needs calibration data, or an adapter's values do not fit it.
        ParityError: the twin differs from the reference by more than the table allows.
        MissingDependencyError: needs the ``export`` extra (onnx_ir).
    """
    bundle = read_bundle(path, Bundle.hold)
    purpose = f"making the {precision} graph of {path}"
    require("onnx", "export", purpose)
    require("onnx_ir", "export", purpose)
    from hhdeploy.exporters.precision.typed import typed_model
    from hhdeploy.exporters.writer import save_graph
    from hhdeploy.graph import open_graph

    low = member(TYPED, precision)
    if low is None:
        raise PlanError(
            f"{path} has no {precision} graph; it has {', '.join(bundle.manifest.graphs)}. "
            f"{' and '.join(TYPED)} are made when they are missing, others are not. "
            f"{graph_hint(bundle.path, precision)}"
        )
    _check_rows(bundle, precision, lambda line: None)  # said once, of the rows at the end
    progress(f"making the {precision} graph")
    plain = open_graph(bundle.graph("float32"))
    if bundle.manifest.layout is None and not bundle.manifest.whole:
        ((name, adapter),) = (
            (a.name, bundle.load_adapter(a.name)) for a in bundle.manifest.adapters
        )
        say(progress, check_folded(name, adapter, plain, [precision]))
    model = typed_model(plain, low)

    def judge(candidate: Bundle) -> Sequence[StageResult]:
        if not candidate.manifest.has(REFERENCE_FILE):
            return []
        progress("verifying it by its rounding twin")
        effects = Effects.of_reference(candidate)
        stages = verify_graphs(candidate, "cpu", [precision], also=effects.measure).stages
        say(progress, effects.lines([precision]))
        return stages

    return add_graph(
        bundle,
        precision,
        lambda target: save_graph(model, target),
        judge,
        accept=lambda now: _check_rows(now, precision, progress),
        lock_timeout=lock_timeout,
        progress=progress,
    )


def _check_rows(bundle: Bundle, precision: Precision, progress: Progress) -> None:
    layout = bundle.manifest.layout
    if layout is not None:
        bank = bundle.bank()
        for entry in bundle.manifest.adapters:
            row = bank[entry.row]
            check_row_range(entry.name, row, [precision])
            say(progress, [check_row_survives(entry.name, layout, row, [precision])])


def add_graph(
    bundle: Bundle,
    precision: Precision,
    save: Save,
    judge: Judge,
    *,
    accept: Callable[[Bundle], None] = lambda now: None,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Add a graph to a bundle, or replace the one of the same precision.

    Args:
        bundle: to be added to.
        precision: of the graph.
        save: writes it.
        judge: its parity.
        accept, lock_timeout, progress: see `commit_graph`.

    Raises: as `commit_graph`.
    """
    with graph_on_trial(bundle, precision, save) as trial:
        return commit_graph(
            bundle,
            trial,
            precision,
            judge(trial),
            accept=accept,
            lock_timeout=lock_timeout,
            progress=progress,
        )


@contextlib.contextmanager
def graph_on_trial(bundle: Bundle, precision: Precision, save: Save) -> Iterator[Bundle]:
    """The bundle with a graph more, in a scratch directory of it: to be judged, never committed.

    Args:
        bundle: it is not changed.
        precision: of the graph; the bundle's own of this precision is not seen.
        save: writes it.

    Raises:
        ConflictError: the bundle was replaced meanwhile.
        WriteError: the file system refused.
    """
    from hhdeploy.exporters.writer import graph_name

    name = graph_name(precision)
    with work_directory(bundle.path) as scratch:
        with os_errors(scratch):
            save(scratch / name)
            hashes = {f"{scratch.name}/{n}": sha256_of(scratch / n) for n in (name, f"{name}.data")}
        manifest = replace(
            bundle.manifest,
            graphs={**bundle.manifest.graphs, precision: f"{scratch.name}/{name}"},
            files={**bundle.manifest.files, **hashes},
        )
        yield replace(bundle, manifest=manifest)


def commit_graph(
    bundle: Bundle,
    trial: Bundle,
    precision: Precision,
    stages: Sequence[StageResult],
    extras: Mapping[str, Save] = MappingProxyType({}),
    *,
    accept: Callable[[Bundle], None] = lambda now: None,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Move a graph from its trial into the bundle, once it has passed.

    What other processes changed meanwhile stays: the graph does not join another float32 graph,
    and says nothing of adapters that were added or replaced. Engines of an older graph stay on
    disk and are refused when opened.

    Args:
        bundle: that the trial was made from.
        trial: from `graph_on_trial`; its files are moved.
        precision: of the graph.
        stages: its parity.
        extras: further files that belong to the graph: name -> what writes it.
        accept: raises if the bundle, as it is by then, cannot have the graph.
        lock_timeout, progress: see `hhdeploy.bundle.store.edit`.

    Raises:
        ParityError: a stage failed; the bundle is unchanged.
        ConflictError: another float32 graph is there by now.
        WriteError: the file system refused.
    """
    judged_on = bundle.parity()["data"] if bundle.manifest.has(PARITY_FILE) else {}
    report = ParityReport(judged_on, stages)
    if stages and not report.passed:
        raise parity_error(report)
    written, basis = trial.manifest.graphs[precision], Basis.of(bundle.manifest)
    graph = trial.path / written
    scratch, name = graph.parent, graph.name
    weights_digest = trial.manifest.files[f"{written}.data"]
    with os_errors(scratch):
        for extra, write in extras.items():
            write(scratch / extra)
        named = _name_by_content(graph, trial.manifest.files[written], weights_digest)
        hashes = {n: sha256_of(scratch / n) for n in (named, *extras)}
        sync_tree(scratch)
    with edit(bundle.path, basis, lock_timeout=lock_timeout, progress=progress) as change:
        accept(change.bundle)
        weights = f"{named}.data"
        change.adopt(f"{name}.data", scratch / weights, weights_digest, weights)
        change.adopt(name, scratch / named, hashes[named], named)
        for extra in extras:
            change.adopt(extra, scratch / extra, hashes[extra])
        graphs = {**change.manifest.graphs, precision: named}
        change.manifest = replace(change.manifest, graphs=graphs)
        kept = {*basis.kept_adapters(change.manifest), BACKBONE}
        _store_stages(change, precision, [s for s in stages if s.adapter in kept])
    return Bundle(bundle.path, change.manifest)


def _name_by_content(graph: Path, digest: str, weights_digest: str) -> str:
    """Rename a graph and its weights: both get the digits of both, as the graph names its
    weights, so that it has no digest that could be in its own name."""
    from hhdeploy.exporters.writer import rename_weights

    named = name_with_digits(graph.name, sha256_of_bytes(f"{digest} {weights_digest}".encode()))
    rename_weights(graph, f"{named}.data")
    graph.rename(graph.with_name(named))
    return named


def _store_stages(change: Change, precision: Precision, stages: Sequence[StageResult]) -> None:
    """parity.json with the stages of one precision replaced."""
    if change.manifest.has(PARITY_FILE):
        content = change.bundle.parity()
        others = [s for s in content["stages"] if s["precision"] != precision]
        content["stages"] = others + [s.to_json() for s in stages]
        change.store(PARITY_FILE, json_bytes(content))
