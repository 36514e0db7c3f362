"""A bundle on disk: the manifest, its files, and adapters added or removed later.

Needs NumPy and safetensors alone. A bundle is changed by writing the new bank beside the old
one and replacing the manifest last; a crash in between leaves the old state readable.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapter import Adapter, load_adapter
from hhdeploy.errors import AdapterError, BundleError, PlanError
from hhdeploy.files import copy_directory, os_errors, sha256_of, write_json
from hhdeploy.parity import PARITY
from hhdeploy.plan import check_base, check_name
from hhdeploy.preprocess import Preprocess
from hhdeploy.rows import RowLayout, check_row_range
from hhdeploy.sites import linear_spec, select_sites
from hhdeploy.tensorfile import read_tensors, write_tensors

SCHEMA_VERSION = 1
MANIFEST, BANK_FILE, REFERENCE_FILE, PARITY_FILE = (
    "hhdeploy.json",
    "bank.safetensors",
    "reference.safetensors",
    "parity.json",
)
# The bank before a change that has not been committed by its manifest.
_PREVIOUS_BANK = "bank.safetensors.previous"
Kind = Literal["folded", "branches"]


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of a bundle.

    Attributes:
        name: how requests call it.
        row: its row in the bank; None in a folded bundle.
        classes: columns of its logits that are its own.
        class_names: one per class, or None.
        preprocess: how its images become inputs.
        verified: False for an adapter added later, until ``verify --against-torch``.
    """

    name: str
    row: int | None
    classes: int
    class_names: tuple[str, ...] | None
    preprocess: Preprocess
    verified: bool

    def label(self, index: int) -> str:
        """Name of a class, its number if it has none."""
        return self.class_names[index] if self.class_names else str(index)

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {
            "name": self.name,
            "row": self.row,
            "classes": self.classes,
            "class_names": list(self.class_names) if self.class_names else None,
            "preprocess": self.preprocess.to_json(),
            "verified": self.verified,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AdapterEntry:
        """Read the manifest's entry."""
        names = content["class_names"]
        return cls(
            content["name"],
            content["row"],
            content["classes"],
            tuple(names) if names else None,
            Preprocess.from_json(content["preprocess"]),
            content["verified"],
        )


@dataclass(frozen=True)
class Manifest:
    """hhdeploy.json.

    Attributes:
        kind: ``folded`` (one adapter in the weights) or ``branches``.
        backbone: model, args, sha256, classes, classifier, preprocess (see `BackboneFacts`).
        classes: columns of the graph's logits.
        adapters: in the order they came.
        layout: the row's layout; None in a folded bundle.
        bank_as_constant: True if the graph has the bank baked in.
        graphs: precision -> file names of the graph.
        engines: entries of built engines.
        files: relative name -> sha256.
        versions: of what wrote the bundle.
    """

    kind: Kind
    backbone: Mapping[str, Any]
    classes: int
    adapters: tuple[AdapterEntry, ...]
    layout: RowLayout | None
    bank_as_constant: bool
    graphs: Mapping[str, str]
    engines: tuple[Mapping[str, Any], ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    # Cached: a server asks for it with every request.
    @functools.cached_property
    def preprocess(self) -> Preprocess:
        """What the bare backbone's images go through."""
        return Preprocess.from_json(self.backbone["preprocess"])

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(3, H, W) of the graph's images."""
        return self.preprocess.input_size

    @property
    def backbone_classes(self) -> int:
        """Classes of the backbone's own classifier if requests may use it, else 0."""
        if self.layout is not None and self.layout.backbone_head:
            return int(self.backbone["classes"])
        return 0

    def adapter(self, name: str) -> AdapterEntry:
        """The entry of an adapter. Raises `BundleError` listing the names there are."""
        for entry in self.adapters:
            if entry.name == name:
                return entry
        known = ", ".join(a.name for a in self.adapters) or "none"
        raise BundleError(f"unknown adapter {name!r}. The bundle has: {known}.")

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "backbone": dict(self.backbone),
            "classes": self.classes,
            "adapters": [a.to_json() for a in self.adapters],
            "row": self.layout.to_json() if self.layout else None,
            "tensors": {
                "images": ["batch", *self.input_size],
                **({"adapter_ids": ["batch"]} if self.layout else {}),
                **(
                    {"adapter_bank": ["slots", self.layout.size]}
                    if self.layout and not self.bank_as_constant
                    else {}
                ),
                "logits": ["batch", self.classes],
            },
            "bank_as_constant": self.bank_as_constant,
            "graphs": dict(self.graphs),
            "engines": [dict(e) for e in self.engines],
            "files": dict(sorted(self.files.items())),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Read the file's content. Raises KeyError, TypeError or ValueError if it is damaged."""
        manifest = cls(
            content["kind"],
            dict(content["backbone"]),
            content["classes"],
            tuple(AdapterEntry.from_json(a) for a in content["adapters"]),
            RowLayout.from_json(content["row"]) if content["row"] is not None else None,
            content["bank_as_constant"],
            dict(content["graphs"]),
            tuple(content["engines"]),
            dict(content["files"]),
            dict(content["versions"]),
        )
        _ = manifest.preprocess  # raises if it is none
        expected = "folded" if manifest.layout is None else "branches"
        if manifest.kind != expected:
            raise ValueError(f"kind {manifest.kind!r}, but its row makes it {expected!r}")
        return manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read a bundle's manifest. Files are checked against it when they are used.

        Raises:
            BundleError: no bundle there, a damaged manifest, or one of a newer version.
        """
        path = Path(path)
        file = path / MANIFEST
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{path} is not a bundle: {MANIFEST} was expected in it. "
                "Make one with: hhdeploy export"
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{file} cannot be read: {error}. Export the bundle again."
            ) from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise BundleError(
                f"{file}: schema_version: expected at most {SCHEMA_VERSION}, found {version!r}. "
                "Upgrade with pip install -U hhdeploy, or export the bundle again."
            )
        try:
            return cls(path, Manifest.from_json(content))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{file} is damaged ({type(error).__name__}: {error}). Export the bundle again."
            ) from error

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files, its hash checked against the manifest.

        Raises:
            BundleError: the file is missing, is not in the manifest, or was changed.
        """
        expected = self.manifest.files.get(name)
        path = self.path / name
        if expected is None or not path.is_file():
            raise BundleError(f"{path} is missing. Export the bundle again.")
        found = sha256_of(path)
        if found != expected:
            raise BundleError(
                f"{path}: expected sha256 {expected[:16]}…, found {found[:16]}…: the file is not "
                "the one that was exported. Copy or export the bundle again."
            )
        return path

    def graph(self, precision: str) -> Path:
        """Path of the graph in a precision, graph and weights checked.

        Raises:
            BundleError: the bundle has no graph of this precision.
        """
        name = self.manifest.graphs.get(precision)
        if name is None:
            raise BundleError(
                f"{self.path} has no {precision} graph; it has "
                f"{', '.join(self.manifest.graphs)}. {graph_hint(self.path, precision)}"
            )
        if f"{name}.data" in self.manifest.files:
            self.file(f"{name}.data")
        return self.file(name)

    def bank(self) -> NDArray[np.float32]:
        """The bank [rows, row] as stored.

        Raises:
            BundleError: a folded bundle, or a damaged file.
        """
        if self.manifest.layout is None:
            raise BundleError(f"{self.path} is a folded bundle: it has no bank.")
        tensors, _ = read_tensors(self._bank_path(), BundleError)
        bank = tensors.get("adapter_bank")
        if bank is None or bank.ndim != 2 or bank.shape[1] != self.manifest.layout.size:
            raise BundleError(
                f"{self.path / BANK_FILE}: expected tensor adapter_bank [rows, "
                f"{self.manifest.layout.size}]. Export the bundle again."
            )
        for entry in self.manifest.adapters:
            if not isinstance(entry.row, int) or not 0 < entry.row < len(bank):
                raise BundleError(
                    f"{self.path / MANIFEST}: adapter {entry.name!r}: expected a row from 1 to "
                    f"{len(bank) - 1}, found {entry.row!r}. Export the bundle again."
                )
        return bank.astype(np.float32, copy=False)

    def _bank_path(self) -> Path:
        """The bank that the manifest names: a change whose manifest never came leaves the
        previous one under another name."""
        previous = self.path / _PREVIOUS_BANK
        if previous.is_file() and sha256_of(previous) == self.manifest.files.get(BANK_FILE):
            return previous
        return self.file(BANK_FILE)

    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
        """Images, adapter rows and float64 logits of the training-time model."""
        tensors, _ = read_tensors(self.file(REFERENCE_FILE), BundleError)
        try:
            return tensors["images"], tensors["adapter_ids"], tensors["logits"]
        except KeyError as error:
            raise BundleError(
                f"{self.path / REFERENCE_FILE}: tensor {error} is missing. Export again."
            ) from error


def graph_hint(path: Path, precision: str) -> str:
    """What brings a graph of a precision into a bundle that lacks it, in words."""
    typed, quantised = (
        [p for stage, p in PARITY if stage == kind] for kind in ("twin", "quantised")
    )
    if precision in typed:
        return f"Export the bundle again with --precision {precision}."
    if precision in quantised:
        return f"Add it with: hhdeploy calibrate {path} --data DIR --precision {precision}"
    return f"Graphs there can be: float32, {', '.join((*typed, *quantised))}."


def entry_of(
    name: str, row: int | None, adapter: Adapter, backbone: Mapping[str, Any], *, verified: bool
) -> AdapterEntry:
    """The manifest's entry for an adapter read from a directory."""
    config = adapter.config
    return AdapterEntry(
        name,
        row,
        adapter.head.weight.shape[0] if adapter.head is not None else int(backbone["classes"]),
        config.class_names,
        config.preprocess or Preprocess.from_json(backbone["preprocess"]),
        verified,
    )


def admit(manifest: Manifest, name: str, adapter: Adapter) -> NDArray[np.float32]:
    """Check that an adapter belongs to a bundle, and pack its row. No torch, no timm.

    Raises:
        PlanError: folded bundle, bank baked in, or a name that is taken.
        AdapterError: another backbone or another input size.
        CapacityError: it does not fit; the message names the flag to export with.
    """
    if manifest.layout is None:
        raise PlanError(
            "a folded bundle holds exactly one adapter. Export without --fold to add more."
        )
    if manifest.bank_as_constant:
        raise PlanError(
            "this bundle has its bank baked into the graph (--bank-as-constant): adapters cannot "
            "be added or removed. Export without that flag."
        )
    check_name(name)
    check_base(name, adapter, manifest.backbone["model"], manifest.backbone["sha256"])
    if adapter.head is not None and adapter.head.path != manifest.backbone["classifier"]:
        raise AdapterError(
            f"{adapter.source}: classifier {adapter.head.path}.weight: expected "
            f"{manifest.backbone['classifier']}.weight."
        )
    preprocess = adapter.config.preprocess
    if preprocess is not None and preprocess.input_size != manifest.input_size:
        raise AdapterError(
            f"{adapter.source}: the image sizes disagree: preprocess.input_size is "
            f"{list(preprocess.input_size)}, the bundle takes {list(manifest.input_size)}."
        )
    classes = manifest.backbone["classes"]
    if adapter.head is None and adapter.config.num_classes not in (None, classes):
        raise AdapterError(
            f"{adapter.source}: num_classes: expected {classes} (the backbone's classifier; the "
            f"adapter brings none), found {adapter.config.num_classes}."
        )
    _check_sites(manifest.layout, adapter)
    row = manifest.layout.pack(name, adapter)
    check_row_range(name, row, manifest.graphs)
    return row


def _check_sites(layout: RowLayout, adapter: Adapter) -> None:
    """No site is missing of those that target_modules name, as far as the bundle knows them."""
    branches = [b for b in layout.branches if b.form == adapter.form]
    linears = [linear_spec(b.linear, b.out * len(b.sites), b.in_) for b in branches]
    selected = select_sites([x for x in linears if x], adapter.config.target_modules)
    missing = [s.name for sites in selected.values() for s in sites if s.name not in adapter.sites]
    if missing:
        raise AdapterError(
            f"{adapter.source}: missing tensor keys for {', '.join(missing)}: target_modules "
            f"{list(adapter.config.target_modules)} name these sites. Save the adapter whole, or "
            "list the sites it has by their full names in target_modules."
        )


def add_adapter(path: str | Path, name: str, directory: str | Path) -> AdapterEntry:
    """Add an adapter to a bundle on disk, atomically. It counts as unverified.

    Raises:
        PlanError, AdapterError, CapacityError: see `admit`; nothing is changed then.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    adapter = load_adapter(directory)
    row = admit(manifest, name, adapter)
    if any(a.name == name for a in manifest.adapters):
        raise PlanError(
            f"the bundle has an adapter {name!r} already. Remove it first, or choose another name."
        )
    taken = {a.row for a in manifest.adapters}
    index = next(i for i in range(1, len(taken) + 2) if i not in taken)
    bank = bundle.bank()
    if index >= len(bank):
        bank = np.concatenate([bank, np.zeros((1, bank.shape[1]), np.float32)])
    bank[index] = row
    entry = entry_of(name, index, adapter, manifest.backbone, verified=False)
    target = bundle.path / "adapters" / name
    source = Path(adapter.source).resolve()
    if source != target.resolve():  # else: left behind by a change that never committed
        with os_errors(target):
            shutil.rmtree(target, ignore_errors=True)
            copy_directory(source, target)
    _commit(bundle, bank, (*manifest.adapters, entry))
    return entry


def remove_adapter(path: str | Path, name: str) -> None:
    """Remove an adapter from a bundle on disk; its row becomes zeros and free.

    Raises:
        BundleError: no such adapter. PlanError: the bundle's adapters are fixed.
    """
    bundle = Bundle.open(path)
    entry = bundle.manifest.adapter(name)
    if bundle.manifest.layout is None or bundle.manifest.bank_as_constant:
        raise PlanError("the adapters of this bundle are in its graph: they cannot be removed.")
    bank = bundle.bank().copy()
    bank[entry.row] = 0.0
    _commit(bundle, bank, tuple(a for a in bundle.manifest.adapters if a.name != name))
    with os_errors(bundle.path):
        shutil.rmtree(bundle.path / "adapters" / name)


def _commit(bundle: Bundle, bank: NDArray[np.float32], adapters: Sequence[AdapterEntry]) -> None:
    """Write the bank, then the manifest; the manifest decides which bank counts."""
    current, previous = bundle.path / BANK_FILE, bundle.path / _PREVIOUS_BANK
    valid = bundle._bank_path()
    with os_errors(current):
        if valid == current:
            previous.unlink(missing_ok=True)
            previous.hardlink_to(current)
    write_tensors(current, {"adapter_bank": bank})
    kept = {a.name for a in adapters}
    files = {
        name: digest
        for name, digest in bundle.manifest.files.items()
        if not name.startswith("adapters/") or name.split("/")[1] in kept
    }
    there = {a.name for a in bundle.manifest.adapters}
    for name in kept - there:
        for file in sorted((bundle.path / "adapters" / name).rglob("*")):
            if file.is_file():
                files[file.relative_to(bundle.path).as_posix()] = sha256_of(file)
    files[BANK_FILE] = sha256_of(current)
    write_manifest(bundle.path, replace(bundle.manifest, adapters=tuple(adapters), files=files))
    previous.unlink(missing_ok=True)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace a bundle's manifest in one step."""
    write_json(path / MANIFEST, manifest.to_json())


def hash_files(path: Path) -> dict[str, str]:
    """sha256 of every file of a bundle but the manifest."""
    return {
        file.relative_to(path).as_posix(): sha256_of(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
