"""Which adapters a bundle has: whether one fits, adding it, removing it, and whether the manifest
says of them what their files say. No torch, no timm."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import (
    WHOLE,
    check,
    check_live,
    check_name,
    headless,
    naming,
    notes,
    unused_head,
)
from hhdeploy.adapters.config import CONFIG_FILE, problem_type_of
from hhdeploy.adapters.directory import adapter_files
from hhdeploy.adapters.format import Adapter, load_adapter
from hhdeploy.adapters.mixing import at_strength
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.meaning import UNSTATED
from hhdeploy.backbones.sites import Form, linear_spec
from hhdeploy.bundle.layout import RowLayout, check_row_range
from hhdeploy.bundle.manifest import (
    ADAPTERS,
    BANK_FILE,
    MANIFEST,
    AdapterEntry,
    Manifest,
)
from hhdeploy.bundle.reading import Bundle
from hhdeploy.bundle.rounding import check_row_survives
from hhdeploy.bundle.store import LOCK_TIMEOUT, Progress, edit
from hhdeploy.choices import RANGED, Precision, listener
from hhdeploy.errors import AdapterError, BundleError, HhdeployError, PlanError
from hhdeploy.files.bundle_json import bundle_path, read_bundle_json
from hhdeploy.files.directories import check_removable
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.files.writing import as_path, os_errors, sha256_of
from hhdeploy.parity import ROW_BOUND

_GRAPH = "preprocess_graph"
# An entry of the manifest, what it says, where that is from, and what is said there.
_Copy = tuple[str, Mapping[str, Any], str, Mapping[str, Any]]


def entry_of(
    name: str, row: int | None, adapter: Adapter, backbone: BackboneFacts, *, verified: bool
) -> AdapterEntry:
    """The manifest's entry for an adapter read from a directory."""
    config = adapter.config
    if not backbone.classifier:  # the graph gives no logits
        return AdapterEntry(
            name,
            row,
            0,
            None,
            config.preprocess or backbone.preprocess,
            verified,
            strength=adapter.strength,
            compressed=config.compressed,
            license=config.license,
        )
    classes = adapter.head.weight.shape[0] if adapter.head is not None else backbone.classes
    # Without a head of its own it answers with the backbone's, and with what that means.
    theirs = backbone.meaning if adapter.head is None else UNSTATED
    return AdapterEntry(
        name,
        row,
        classes,
        config.class_names or theirs.class_names,
        config.preprocess or backbone.preprocess,
        verified,
        problem_type_of(config.problem_type or theirs.problem_type, classes),
        adapter.strength,
        config.compressed,
        config.license,
    )


def entry_of_whole(backbone: BackboneFacts) -> AdapterEntry:
    """The manifest's one entry for a model that is exported as it is."""
    names, kind = backbone.meaning.class_names, backbone.meaning.problem_type
    task = problem_type_of(kind, backbone.classes)
    return AdapterEntry(WHOLE, None, backbone.classes, names, backbone.preprocess, False, task)


def admit(
    manifest: Manifest, name: str, adapter: Adapter, progress: Progress = lambda step: None
) -> NDArray[np.float32]:
    """Check that an adapter belongs to a bundle, and pack its row. No torch, no timm.

    ``progress`` is told what is assumed of it, and what a graph makes no use of or rounds away.

    Raises:
        PlanError: folded bundle, bank baked in, a name that is taken, or an adapter that can
            only be folded.
        AdapterError: see `check`.
        CapacityError: it does not fit; the message names the flag to export with. Or a float16
            graph would round all of it away.
    """
    if manifest.layout is None:
        raise PlanError(
            "a folded bundle holds exactly one adapter. Export without `fold=True` to add more."
        )
    if manifest.bank_as_constant:
        raise PlanError(
            "this bundle has its bank baked into the graph: adapters cannot be added or removed. "
            "Export without `bank_as_constant=True`."
        )
    check_name(name)
    check_live(name, adapter)
    unused = None
    if not manifest.classes:
        unused, adapter = unused_head(name, adapter), headless(name, adapter)
    check(name, adapter, _facts(manifest.backbone, manifest.layout, adapter.form), whole=False)
    row = manifest.layout.pack(name, adapter)
    check_row_range(name, row, manifest.graphs)
    lost = check_row_survives(name, manifest.layout, row, manifest.graphs)
    for line in (lost, *notes(name, adapter, manifest.backbone), unused):
        if line:
            progress(line)
    return row


def unseen(name: str, precisions: Iterable[Precision]) -> list[str]:
    """A line for each of the precisions whose ranges were found without an adapter that comes
    now."""
    return [
        f"adapter {name!r}: the ranges of {precision} were found without it, and values beyond "
        "them are clipped: its answers may be others than float32's"
        for precision in precisions
        if precision in RANGED
    ]


def _facts(backbone: BackboneFacts, layout: RowLayout, form: Form) -> BackboneFacts:
    """A bundle's backbone with the Linears whose size its row tells an adapter of this form.

    The sequential form needs the outputs alone, which any branch tells. So does it tell whether a
    fused qkv is three sites: in some models (TinyViT, MaxViT) it is one.
    """
    branches = {b.linear: b for b in layout.branches if form in (b.form, "sequential")}
    linears = tuple(
        linear_spec(b.linear, b.out * len(b.sites), b.in_, thirds=len(b.sites) > 1)
        for b in branches.values()
    )
    return replace(backbone, linears=linears)


def add_adapter(
    path: str | Path,
    name: str,
    directory: str | Path,
    *,
    strength: float = 1.0,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> AdapterEntry:
    """Add an adapter to a bundle on disk, atomically. It counts as unverified.

    Args:
        path: the bundle.
        name: how requests will call it.
        directory: the adapter directory; it is copied as it is.
        strength: what its change of the backbone is multiplied by.
        lock_timeout: see `edit`.
        progress: see `edit`.

    Raises:
        PlanError, AdapterError, CapacityError: see `admit`; nothing is changed.
        ConflictError, WriteError: see `edit`.
    """
    progress = listener(progress)
    if not isinstance(directory, str | os.PathLike):
        raise AdapterError(
            f"expected the directory of an adapter, found {type(directory).__name__}. "
            "save_adapter(adapter, directory) writes one."
        )
    source, target = as_path(directory, "directory"), bundle_path(path)
    with os_errors(target):
        hashes = {n: sha256_of(source / n) for n in adapter_files(source, target)}
    adapter = at_strength(load_adapter(source), strength)
    with edit(path, lock_timeout=lock_timeout, progress=progress) as change:
        manifest = change.manifest
        row = admit(manifest, name, adapter, progress)
        others = [a.name for a in manifest.adapters]
        for line in (*naming(name, others), *unseen(name, manifest.graphs)):
            progress(line)
        if any(a.name == name for a in manifest.adapters):
            raise PlanError(
                f"the bundle has an adapter {name!r} already. Remove it first, or choose another "
                "name."
            )
        taken = {a.row for a in manifest.adapters}
        index = next(i for i in range(1, len(taken) + 2) if i not in taken)
        stored = change.bundle.bank()
        bank = np.zeros((max(len(stored), index + 1), stored.shape[1]), np.float32)
        bank[: len(stored)] = stored
        bank[index] = row
        entry = entry_of(name, index, adapter, manifest.backbone, verified=False)
        change.copy_adapter(name, source, hashes)
        change.store(BANK_FILE, tensor_bytes({"adapter_bank": bank}))
        change.manifest = replace(change.manifest, adapters=(*manifest.adapters, entry))
    return entry


def remove_adapter(
    path: str | Path,
    name: str,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> None:
    """Remove an adapter from a bundle on disk; its row becomes zeros and free.

    Raises:
        BundleError: no such adapter. PlanError: the bundle's adapters are fixed.
        ConflictError, WriteError: see `edit`.
    """
    progress = listener(progress)
    with edit(path, lock_timeout=lock_timeout, progress=progress) as change:
        manifest = change.manifest
        entry = manifest.adapter(name)
        if manifest.layout is None or manifest.bank_as_constant:
            raise PlanError("the adapters of this bundle are in its graph: they cannot be removed.")
        bank = change.bundle.bank().copy()
        bank[entry.row] = 0.0
        check_removable(change.bundle.path / ADAPTERS / name)
        change.forget_adapter(name)
        change.store(BANK_FILE, tensor_bytes({"adapter_bank": bank}))
        kept = tuple(a for a in manifest.adapters if a.name != name)
        change.manifest = replace(change.manifest, adapters=kept)


def check_copies(bundle: Bundle) -> None:
    """Compare adapters' entries and rows with the adapters' files, which have their hashes, and
    what clients without Python feed to graphs of pictures with the preprocessing: no hash covers
    the manifest, and a row, a name or a mean that is another one there is another answer.

    Raises:
        BundleError: naming the first that differs. ConflictError: see `Bundle.load_adapter`.
    """
    for where, says, source, right in (*_entries(bundle), *_graphs(bundle)):
        found, expected = dict(_values(says)), dict(_values(right))
        for key in {**expected, **found}:
            if found.get(key) != expected.get(key):
                raise BundleError(
                    f"{bundle.path / MANIFEST}: {where}: {key}: expected {expected.get(key)!r}, as "
                    f"{source} says, found {found.get(key)!r}: the manifest is not the one that "
                    "was written. Copy or export the bundle again."
                )


def _entries(bundle: Bundle) -> Iterator[_Copy]:
    manifest = bundle.manifest
    bank = bundle.bank() if manifest.layout is not None else None
    if bank is not None and bank[0].any():
        raise BundleError(
            f"{bundle.path / manifest.named(BANK_FILE)}: expected zeros in row 0, the bare "
            "backbone's, found other values there: the bank is not the one that was written. Copy "
            "or export the bundle again."
        )
    for entry in manifest.adapters:
        if manifest.whole:
            source, right = "backbone", entry_of_whole(manifest.backbone)
        else:
            source = f"{ADAPTERS}/{entry.name}/{CONFIG_FILE}"
            adapter = bundle.load_adapter(entry.name)
            if bank is not None and not _is_in_row(manifest, bank, entry, adapter):
                raise BundleError(
                    f"{bundle.path / MANIFEST}: adapter {entry.name!r}: expected it in row "
                    f"{entry.row} of {manifest.named(BANK_FILE)}, at strength {entry.strength:g}, "
                    "found other values there: manifest or bank is not the one that was written. "
                    "Copy or export the bundle again."
                )
            right = entry_of(entry.name, entry.row, adapter, manifest.backbone, verified=False)
        yield f"adapter {entry.name!r}", _answering(entry), source, _answering(right)


def _is_in_row(
    manifest: Manifest, bank: NDArray[np.float32], entry: AdapterEntry, adapter: Adapter
) -> bool:
    """Whether the row that an entry names is the one that its adapter is packed to."""
    assert manifest.layout is not None
    try:
        own = adapter if manifest.classes else headless(entry.name, adapter)
        right = manifest.layout.pack(entry.name, own)
    except HhdeployError:  # what has no place in such rows is in none
        return False
    largest = float(np.max(np.abs(right[np.isfinite(right)]), initial=0.0))
    return np.allclose(bank[entry.row], right, rtol=ROW_BOUND, atol=ROW_BOUND * largest)


def _answering(entry: AdapterEntry) -> dict[str, Any]:
    """What of an entry decides on answers and their names, apart from its row."""
    return {
        "classes": entry.classes,
        "class_names": list(entry.class_names or ()),
        "problem_type": entry.problem_type,
        "preprocess": entry.preprocess.to_json(),
    }


def _graphs(bundle: Bundle) -> Iterator[_Copy]:
    """Of the file itself: Python does not read them."""
    content = read_bundle_json(bundle.path)
    if bundle.changed():  # what is there by now is for those who read that
        return
    ours = bundle.manifest.to_json()
    entries = [("backbone", content["backbone"], ours["backbone"])]
    entries += [
        (f"adapter {right['name']!r}", found, right)
        for found, right in zip(content["adapters"], ours["adapters"], strict=True)
    ]
    for where, found, right in entries:
        if _GRAPH in found:
            yield where, {_GRAPH: found[_GRAPH]}, "preprocess", {_GRAPH: right.get(_GRAPH)}


def _values(content: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """``a.b[0]`` and its value, of all that JSON holds."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _values(value, f"{where}.{key}" if where else key)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _values(value, f"{where}[{number}]")
    else:
        yield where, content
