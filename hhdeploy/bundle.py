"""A bundle on disk as a reader sees it: the manifest, its files, and whether an adapter fits.

Needs NumPy and safetensors alone. Bundles are changed by `hhdeploy.store`; nobody finds a file
but through the manifest, and what is read is what was hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import check_base, check_name
from hhdeploy.adapters.format import Adapter, load_adapter
from hhdeploy.backbones.sites import linear_spec, select_sites
from hhdeploy.errors import AdapterError, BundleError, ConflictError, HhdeployError, PlanError
from hhdeploy.files.tensors import tensors_of
from hhdeploy.files.writing import sha256_of, sha256_of_bytes, write_json
from hhdeploy.parity import PARITY
from hhdeploy.preprocess import Preprocess
from hhdeploy.rows import RowLayout, check_row_range

if TYPE_CHECKING:
    from hhdeploy.store import add_adapter as add_adapter
    from hhdeploy.store import remove_adapter as remove_adapter

SCHEMA_VERSION = 1
MANIFEST, BANK_FILE, REFERENCE_FILE, PARITY_FILE = (
    "hhdeploy.json",
    "bank.safetensors",
    "reference.safetensors",
    "parity.json",
)
# Where adapters are kept as they came, a directory each.
ADAPTERS = "adapters"
# Files of the state before the last change, for those who opened it.
OLD = ".old"
# Earlier versions: the bank before a change that has not been committed by its manifest.
PREVIOUS_BANK = "bank.safetensors.previous"
# A file that a change put there has eight digits of its content before its suffix.
_DIGITS = re.compile(r"\.[0-9a-f]{8}(?=\.(safetensors|json|onnx|onnx\.data|engine)$)")
_SUFFIX = re.compile(r"(?=\.(safetensors|json|onnx|onnx\.data|engine)$)")
# How often reading starts again when the bundle is changed meanwhile.
_TRIES = 3
Kind = Literal["folded", "branches"]
_T = TypeVar("_T")


def plain_name(name: str) -> str:
    """The name that a file has in a fresh export: its role in the bundle."""
    return _DIGITS.sub("", name)


def name_with_digits(name: str, digest: str) -> str:
    """``bank.safetensors`` as ``bank.3fa9c1d2.safetensors``."""
    return _SUFFIX.sub(f".{digest[:8]}", name, count=1)


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
        preprocess: what the bare backbone's images go through; from ``backbone``.
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

    # Parsed once: a server asks for it with every request. Whatever is passed is replaced.
    preprocess: Preprocess = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "preprocess", Preprocess.from_json(self.backbone["preprocess"]))

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

    def named(self, role: str) -> str:
        """The name that a file has now, by the one it has in a fresh export."""
        return next((n for n in self.files if "/" not in n and plain_name(n) == role), role)

    def has(self, role: str) -> bool:
        """Whether there is a file of this role, whatever its digits."""
        return self.named(role) in self.files

    def graph_digest(self, precision: str) -> str:
        """sha256 over the hashes of a graph's file and of its weights; "" without such a graph."""
        graph = self.graphs.get(precision)
        if graph is None:
            return ""
        hashes = [self.files.get(name, "") for name in (graph, f"{graph}.data")]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def adapter_digest(self, name: str) -> str:
        """sha256 over the names and hashes of an adapter's files."""
        lines = [f"{n} {d}" for n, d in self.files.items() if n.startswith(f"{ADAPTERS}/{name}/")]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

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
        expected = "folded" if manifest.layout is None else "branches"
        if manifest.kind != expected:
            raise ValueError(f"kind {manifest.kind!r}, but its row makes it {expected!r}")
        return manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle directory and its manifest.

    Attributes:
        path: the directory.
        manifest: as it was when the bundle was opened.
        held: files that were read already: name -> content; see `hold`.
    """

    path: Path
    manifest: Manifest
    held: Mapping[str, bytes] = field(
        default_factory=lambda: MappingProxyType({}), repr=False, compare=False
    )

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
            ConflictError: the bundle was changed since it was opened, and the file is gone.
            BundleError: the file is missing, is not in the manifest, or was damaged.
        """
        expected, found = self.manifest.files.get(name), None
        for path in self._places(name) if expected is not None else ():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                digest = sha256_of(path)
                if digest == expected:
                    return path
                found = found or digest
        raise self._damage(name, expected, found)

    def read(self, name: str) -> bytes:
        """Content of one of the bundle's files: the bytes that were hashed. Raises as `file`."""
        if name in self.held:
            return self.held[name]
        expected, found = self.manifest.files.get(name), None
        for path in self._places(name) if expected is not None else ():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                content = path.read_bytes()
                digest = sha256_of_bytes(content)
                if digest == expected:
                    return content
                found = found or digest
        raise self._damage(name, expected, found)

    def _places(self, name: str) -> tuple[Path, ...]:
        """Where a file is, where the last change moved it, and where an interrupted change of an
        earlier version left it."""
        places = (self.path / name, self.path / OLD / name)
        return (*places, self.path / PREVIOUS_BANK) if name == BANK_FILE else places

    def _damage(self, name: str, expected: str | None, found: str | None) -> BundleError:
        path = self.path / name
        if self.changed():
            return ConflictError(
                f"{self.path} was changed by another process meanwhile ({name} is no longer a part "
                "of it). Nothing was written. Run the command again."
            )
        if expected is None or found is None:
            return BundleError(f"{path} is missing. Export the bundle again.")
        return BundleError(
            f"{path}: expected sha256 {expected[:16]}…, found {found[:16]}…: the file is not "
            "the one that was exported. Copy or export the bundle again."
        )

    def changed(self) -> bool:
        """Whether the bundle on disk is another one than when this one was opened."""
        try:
            return Bundle.open(self.path).manifest != self.manifest
        except BundleError:
            return not (self.path / MANIFEST).is_file()

    def hold(self) -> Bundle:
        """The same with all that later changes might take away, but for the graphs, in memory."""
        names = map(self.manifest.named, (BANK_FILE, REFERENCE_FILE, PARITY_FILE))
        held = {name: self.read(name) for name in names if name in self.manifest.files}
        return replace(self, held=MappingProxyType(held))

    def check_files(self) -> None:
        """Compare every file that the manifest names with its hash.

        Raises:
            BundleError: naming all that are missing or were damaged. ConflictError: see `file`.
        """
        broken = []
        for name in self.manifest.files:
            try:
                self.file(name)
            except ConflictError:
                raise
            except BundleError as error:
                broken.append(str(error))
        if broken:
            raise BundleError("\n".join(broken))

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
        """The bank [rows, row] as stored, not to be written to.

        Raises:
            BundleError: a folded bundle, or a damaged file.
        """
        if self.manifest.layout is None:
            raise BundleError(f"{self.path} is a folded bundle: it has no bank.")
        name = self.manifest.named(BANK_FILE)
        bank = tensors_of(self.read(name), self.path / name, BundleError).get("adapter_bank")
        if bank is None or bank.ndim != 2 or bank.shape[1] != self.manifest.layout.size:
            raise BundleError(
                f"{self.path / name}: expected tensor adapter_bank [rows, "
                f"{self.manifest.layout.size}]. Export the bundle again."
            )
        for entry in self.manifest.adapters:
            if not isinstance(entry.row, int) or not 0 < entry.row < len(bank):
                raise BundleError(
                    f"{self.path / MANIFEST}: adapter {entry.name!r}: expected a row from 1 to "
                    f"{len(bank) - 1}, found {entry.row!r}. Export the bundle again."
                )
        return bank.astype(np.float32, copy=False)

    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
        """Images, adapter rows and float64 logits of the training-time model."""
        name = self.manifest.named(REFERENCE_FILE)
        tensors = tensors_of(self.read(name), self.path / name, BundleError)
        try:
            return tensors["images"], tensors["adapter_ids"], tensors["logits"]
        except KeyError as error:
            raise BundleError(
                f"{self.path / name}: tensor {error} is missing. Export again."
            ) from error

    def parity(self) -> dict[str, Any]:
        """Content of parity.json."""
        content: dict[str, Any] = json.loads(self.read(self.manifest.named(PARITY_FILE)))
        return content

    def load_adapter(self, name: str) -> Adapter:
        """An adapter as it came to the bundle, from files of the manifest's hashes."""
        names = [n for n in self.manifest.files if n.startswith(f"{ADAPTERS}/{name}/")]
        if not names:
            raise BundleError(f"{self.path / ADAPTERS / name} is missing. Export the bundle again.")
        for root in (self.path, self.path / OLD):
            if self._intact(root, names):
                adapter = load_adapter(root / ADAPTERS / name)
                if self._intact(root, names):  # nobody put another one there meanwhile
                    return adapter
        for file in names:
            self.file(file)  # says which one is damaged
        raise self._damage(names[0], None, None)

    def _intact(self, root: Path, names: Sequence[str]) -> bool:
        try:
            return all(sha256_of(root / n) == self.manifest.files[n] for n in names)
        except (FileNotFoundError, NotADirectoryError):
            return False


def read_bundle(
    path: str | Path,
    work: Callable[[Bundle], _T],
    discard: Callable[[_T], None] = lambda made: None,
) -> _T:
    """``work(Bundle.open(path))``, started again when the bundle was changed meanwhile.

    Args:
        path: the bundle.
        work: what is to be read or opened.
        discard: given what ``work`` made from files of two bundles: the directory was replaced.

    Raises:
        ConflictError: it was changed again and again.
        BundleError, HhdeployError: see ``work``.
    """
    for _ in range(_TRIES):
        try:
            before = os.stat(path)
        except OSError:
            before = None
        bundle = Bundle.open(path)
        try:
            made = work(bundle)
        except (HhdeployError, OSError):
            if not bundle.changed():
                raise
            continue
        if before is not None and _is(before, path):
            return made
        discard(made)
    raise ConflictError(
        f"{path} was changed {_TRIES} times while it was read. Try again when the changes have "
        "ended."
    )


def _is(before: os.stat_result, path: str | Path) -> bool:
    try:
        return os.path.samestat(before, os.stat(path))
    except OSError:
        return False


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
            "this bundle has its bank baked into the graph: adapters cannot be added or removed. "
            "Export without --bank-as-constant."
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


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace a bundle's manifest in one step."""
    write_json(path / MANIFEST, manifest.to_json())


def hash_files(path: Path) -> dict[str, str]:
    """sha256 of every file of a bundle but the manifest, and what is hidden at the top."""
    return {
        file.relative_to(path).as_posix(): sha256_of(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.relative_to(path).parts[0].startswith((MANIFEST, "."))
    }


def __getattr__(name: str) -> Any:
    # They change a bundle, which `store` does, and that is built on this module.
    if name in ("add_adapter", "remove_adapter"):
        from hhdeploy import store

        return getattr(store, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
