"""Write a bundle: graphs, bank, adapters, reference, manifest."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter, load_adapter, tensors_of
from hhdeploy.bundle.layout import check_row_range
from hhdeploy.bundle.manifest import (
    BANK_FILE,
    REFERENCE_FILE,
    AdapterEntry,
    Manifest,
    hash_files,
    write_manifest,
)
from hhdeploy.bundle.membership import entry_of, entry_of_whole
from hhdeploy.choices import Precision, TypedPrecision
from hhdeploy.errors import AdapterError
from hhdeploy.exporters.bake import baked
from hhdeploy.exporters.branches import branched_model
from hhdeploy.exporters.fold import folded_model
from hhdeploy.exporters.portable.form import GraphForm
from hhdeploy.exporters.portable.pictures import write_picture_graphs
from hhdeploy.exporters.precision.typed import typed_model
from hhdeploy.exporters.trace import EXTERNAL_THRESHOLD, BaseGraph
from hhdeploy.files.directories import check_place
from hhdeploy.files.tensors import write_tensors
from hhdeploy.files.writing import copy_directory
from hhdeploy.graph import call_weights
from hhdeploy.plan import Plan, check_whole
from hhdeploy.verifying.reference import Reference

_PLAIN = GraphForm()
_VERSIONED = ("hhdeploy", "torch", "timm", "onnx", "onnx-ir", "onnxscript", "numpy")


@dataclass(frozen=True, eq=False)
class Contents:
    """What a bundle is written from.

    Attributes:
        model: the float32 graph.
        manifest: without files and graphs of other precisions; they are filled in.
        bank: [rows, row], None for a folded bundle.
        adapters: name -> adapter as loaded; its directory is copied as it came. Empty for a whole
            model without one.
    """

    model: ir.Model
    manifest: Manifest
    bank: NDArray[np.float32] | None
    adapters: Mapping[str, Adapter]


def folded_contents(base: BaseGraph, name: str, adapter: Adapter) -> Contents:
    """One adapter in the weights of a plain graph."""
    entry = entry_of(name, None, adapter, base.facts, verified=False)
    return Contents(folded_model(base, adapter), _manifest(base, [entry]), None, {name: adapter})


def whole_contents(base: BaseGraph) -> Contents:
    """The model as it is, under one name, for everything that a folded bundle is good for.

    Raises:
        PlanError: see `hhdeploy.plan.check_whole`.
    """
    check_whole(base.facts)
    manifest = _manifest(base, [entry_of_whole(base.facts)])
    return Contents(base.model.clone(), manifest, None, {})


def branches_contents(
    base: BaseGraph,
    plan: Plan,
    adapters: Mapping[str, Adapter],
    *,
    bank_as_constant: bool,
    precisions: Sequence[TypedPrecision],
) -> Contents:
    """All adapters of a plan as side branches of one graph."""
    bank = np.zeros((len(plan.names) + 1, plan.layout.size), np.float32)
    entries = []
    for row, name in enumerate(plan.names, start=1):
        bank[row] = plan.layout.pack(name, adapters[name])
        check_row_range(name, bank[row], precisions)
        entries.append(entry_of(name, row, adapters[name], base.facts, verified=False))
    manifest = _manifest(base, entries, plan, bank_as_constant=bank_as_constant)
    model = branched_model(base, plan)
    return Contents(baked(model, bank) if bank_as_constant else model, manifest, bank, adapters)


def _manifest(
    base: BaseGraph,
    entries: Sequence[AdapterEntry],
    plan: Plan | None = None,
    *,
    bank_as_constant: bool = False,
) -> Manifest:
    """Of side branches; without a plan, of a graph with its one adapter in the weights."""
    return Manifest(
        kind="folded" if plan is None else "branches",
        backbone=replace(base.facts, linears=()),
        classes=entries[0].classes if plan is None else plan.classes,
        adapters=tuple(entries),
        layout=None if plan is None else plan.layout,
        bank_as_constant=bank_as_constant,
        graphs={},
        versions=versions(),
        features=base.features,
    )


def graph_name(precision: Precision) -> str:
    """File name of a graph: model.onnx is float32, others say their precision."""
    return "model.onnx" if precision == "float32" else f"model.{precision}.onnx"


def save_graph(model: ir.Model, path: Path, *, single_file: bool = False) -> None:
    """Write a graph with its weights beside it, in ``<name>.data``, or inside of it."""
    if single_file:
        ir.save(model, path)
        return
    ir.save(
        model,
        path,
        external_data=f"{path.name}.data",
        size_threshold_bytes=EXTERNAL_THRESHOLD,
    )


def rename_weights(graph: Path, name: str) -> None:
    """Rename a graph's file of weights, in the same directory, and what the graph calls it.

    Raises:
        FileNotFoundError: the graph has no weights beside it.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    call_weights(model, name)
    onnx.save(model, graph)
    graph.with_name(f"{graph.name}.data").rename(graph.with_name(name))


def write_bundle(
    path: Path,
    contents: Contents,
    precisions: Sequence[TypedPrecision],
    reference: Callable[[], Reference] | None,
    form: GraphForm = _PLAIN,
) -> Manifest:
    """Write everything into an existing, empty directory; the manifest last.

    Args:
        path: the directory (a scratch one: see `hhdeploy.files.directories.atomic_directory`).
        contents: graph, bank, adapters.
        precisions: of further graphs; float32 is always written.
        reference: computes the training-time reference; called once the graphs are written and
            released. None writes none (the bundle then counts as unverified).
        form: of the graphs.

    Raises:
        AdapterError: an adapter's directory was changed since it was loaded.
        WriteError: the names of two adapters are one there.
    """
    form.apply(contents.model, contents.manifest)
    graphs: dict[Precision, str] = {"float32": graph_name("float32")}
    save_graph(contents.model, path / graphs["float32"], single_file=form.single_file)
    for precision in precisions:
        graphs[precision] = graph_name(precision)
        typed = typed_model(contents.model, precision)
        save_graph(typed, path / graphs[precision], single_file=form.single_file)
    write_picture_graphs(path, contents.manifest.input_size[0])
    if contents.bank is not None:
        write_tensors(path / BANK_FILE, {"adapter_bank": contents.bank})
    for name, adapter in contents.adapters.items():
        check_place(path, f"adapters/{name}")
        _copy_adapter(adapter, path / "adapters" / name)
    if reference is not None:
        write_tensors(path / REFERENCE_FILE, reference().tensors(contents.manifest))
    manifest = replace(contents.manifest, graphs=graphs, files=hash_files(path))
    write_manifest(path, manifest)
    return manifest


def _copy_adapter(adapter: Adapter, target: Path) -> None:
    """Copy an adapter's directory, which minutes may have passed since it was loaded: what lies in
    the bundle is what the graphs, the bank and the reference were made of."""
    copy_directory(Path(adapter.source), target)
    copied = load_adapter(target)
    was, now = tensors_of(adapter), tensors_of(copied)
    # A bundle of features makes nothing of the head, and of what the configuration says of it.
    same = adapter.head is None or copied.config == adapter.config
    same = same and copied.sites.keys() == adapter.sites.keys()
    if not same or not all(key in now and np.array_equal(was[key], now[key]) for key in was):
        raise AdapterError(
            f"{adapter.source} was changed while it was exported. Export again once it is complete."
        )


def versions() -> dict[str, str]:
    """Versions of what a bundle is written with."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
