"""A bundle on disk as a reader sees it: what is read is what was hashed.

Reading takes no lock. A file that is gone or another one by now means that the bundle was changed
meanwhile, or is damaged: the manifest on disk tells which.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter, load_adapter
from hhdeploy.adapters.mixing import at_strength
from hhdeploy.backbones.licences import CARD
from hhdeploy.bundle.manifest import (
    ADAPTERS,
    BANK_FILE,
    LOCK_TIMEOUT,
    MANIFEST,
    OLD,
    PARITY_FILE,
    PREVIOUS_BANK,
    REFERENCE_FILE,
    Manifest,
)
from hhdeploy.choices import TYPED, Precision
from hhdeploy.errors import BundleError, ConflictError, HhdeployError, as_code
from hhdeploy.files.bundle_checks import check_bundle_json
from hhdeploy.files.bundle_json import bundle_path, json_object, read_bundle_json
from hhdeploy.files.plain import ends_changed, read_plain, what_instead
from hhdeploy.files.tensors import tensors_of
from hhdeploy.files.writing import sha256_of, sha256_of_bytes

if TYPE_CHECKING:
    from hhdeploy.bundle.store import Change, Progress

# The card of a manifest that was committed, until it takes the place of the old one.
NEW_CARD = f".{CARD}.new"
_TRIES = 3  # how often reading starts again when the bundle is changed meanwhile
_T = TypeVar("_T")


@dataclass(frozen=True)
class Bundle:
    """A bundle directory and its manifest, as it was when it was opened.

        bundle = Bundle.open("models")
        bundle = bundle.add("flowers", "adapters/flowers")
        bundle = bundle.remove("digits")

    Attributes:
        path: the directory, absolute: the process may change its own.
        manifest: as it was when the bundle was opened.
        held: files that were read already: name -> content; see `hold`.
    """

    path: Path
    manifest: Manifest = field(hash=False)
    held: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read a bundle's manifest. Files are checked against it when they are used.

        Raises:
            BundleError: no bundle there, a damaged manifest, or one of a newer version.
        """
        path = bundle_path(path)
        content = read_bundle_json(path)
        try:
            check_bundle_json(content)
            return cls(path.absolute(), Manifest.from_json(content))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BundleError(
                f"{path / MANIFEST} is damaged ({type(error).__name__}: {error}). Export the "
                "bundle again."
            ) from error

    def add(
        self,
        name: str,
        directory: str | Path,
        *,
        strength: float = 1.0,
        lock_timeout: float = LOCK_TIMEOUT,
        progress: Progress = lambda step: None,
    ) -> Bundle:
        """Add an adapter on disk: `hhdeploy.bundle.add_adapter`, whose arguments these are.

        This value stays what it was; sessions that are open do too. Returns the bundle as it is
        now, opened again.

        Raises:
            PlanError, AdapterError, CapacityError, ConflictError, WriteError: see `add_adapter`.
        """
        from hhdeploy.bundle.membership import add_adapter  # which builds on this module

        add_adapter(
            self.path,
            name,
            directory,
            strength=strength,
            lock_timeout=lock_timeout,
            progress=progress,
        )
        return Bundle.open(self.path)

    def remove(
        self,
        name: str,
        *,
        lock_timeout: float = LOCK_TIMEOUT,
        progress: Progress = lambda step: None,
    ) -> Bundle:
        """Remove an adapter on disk: `hhdeploy.bundle.remove_adapter`. Returns as `add`.

        Raises:
            BundleError, PlanError, ConflictError, WriteError: see `remove_adapter`.
        """
        from hhdeploy.bundle.membership import remove_adapter

        remove_adapter(self.path, name, lock_timeout=lock_timeout, progress=progress)
        return Bundle.open(self.path)

    def edit(
        self,
        *,
        lock_timeout: float = LOCK_TIMEOUT,
        progress: Progress = lambda step: None,
    ) -> contextlib.AbstractContextManager[Change]:
        """Change the bundle on disk, whole or not at all: `hhdeploy.bundle.edit`.

            with bundle.edit() as change:
                change.manifest = replace(change.manifest, ...)

        ``change.bundle`` is the bundle as it is at that moment: others may have added and removed
        adapters since this one was opened, but its float32 graph is the same.

        Raises:
            ConflictError: another change did not end in time, or the bundle was exported again
                since this one was opened. BundleError, WriteError: see `edit`.
        """
        from hhdeploy.bundle.store import Basis, edit

        basis = Basis.of(self.manifest)
        return edit(self.path, basis, lock_timeout=lock_timeout, progress=progress)

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files, its hash checked against the manifest.

        Raises:
            ConflictError: the bundle was changed since it was opened, and the file is gone.
            BundleError: the file is missing, is not in the manifest, or was damaged.
        """
        return self._found(name, lambda path: (path, sha256_of(path)))

    def read(self, name: str) -> bytes:
        """Content of one of the bundle's files: the bytes that were hashed. Raises as `file`."""
        if name in self.held:
            return self.held[name]

        def hashed(path: Path) -> tuple[bytes, str]:
            content = read_plain(path)
            return content, sha256_of_bytes(content)

        return self._found(name, hashed)

    def _found(self, name: str, look: Callable[[Path], tuple[_T, str]]) -> _T:
        """What ``look`` gives, with its digest, at the first place that has the right one."""
        expected, wrong, unread = self.manifest.files.get(name), None, None
        for path in self._places(name) if expected is not None else ():
            try:
                found, digest = look(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                unread = unread or error
                continue
            if digest == expected:
                return found
            wrong = wrong or digest
        raise self._damage(name, expected, wrong, unread) from unread

    def _places(self, name: str) -> tuple[Path, ...]:
        """Where a file is, where the last change moved it, and where an interrupted change, of an
        earlier version for the bank, left it."""
        places = (self.path / name, self.path / OLD / name)
        more = {BANK_FILE: PREVIOUS_BANK, CARD: NEW_CARD}.get(name)
        return (*places, self.path / more) if more else places

    def _damage(
        self, name: str, expected: str | None, found: str | None, unread: OSError | None = None
    ) -> BundleError:
        path = self.path / name
        if self.changed():
            return ConflictError(
                f"{self.path} was changed by another process meanwhile ({name} is no longer a part "
                "of it). Nothing was written. Run the command again."
            )
        if unread is not None:
            return BundleError(
                f"{path} cannot be read: {unread.strerror}. Give it its permissions, or copy or "
                "export the bundle again."
            )
        if expected is None or found is None:
            return BundleError(f"{path} is missing. Export the bundle again.")
        what = "the file is not the one that was exported"
        with contextlib.suppress(OSError):
            what = what_instead(path) or ends_changed(path, expected) or what
        return BundleError(
            f"{path}: expected sha256 {expected[:16]}…, found {found[:16]}…: {what}. Copy or "
            "export the bundle again."
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
        return replace(self, held=held)

    def check_files(self) -> None:
        """Compare every file that the manifest names with their hashes, and the manifest with them.

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
        from hhdeploy.bundle.membership import check_copies  # which builds on this module

        check_copies(self)

    def graph(self, precision: Precision) -> Path:
        """Path of the graph in a precision, graph and weights checked.

        Raises:
            BundleError: the bundle has no graph of this precision, a damaged one, or weights
                without a hash.
        """
        name = self.manifest.graphs.get(precision)
        if name is None:
            raise BundleError(
                f"{self.path} has no {precision} graph; it has "
                f"{', '.join(self.manifest.graphs) or 'none'}. {graph_hint(self.path, precision)}"
            )
        weights = f"{name}.data"
        if weights in self.manifest.files:
            self.file(weights)
        elif (self.path / weights).exists():
            raise BundleError(
                f"{self.path / MANIFEST}: files: expected the sha256 of {weights}, found none. "
                "Export the bundle again."
            )
        return self.file(name)

    def bank(self) -> NDArray[np.float32]:
        """The bank [rows, row], not to be written to. Raises `BundleError`: a folded bundle, or a
        damaged file."""
        if self.manifest.layout is None:
            raise BundleError(f"{self.path} is a folded bundle: it has no bank.")
        name, backbone = self.manifest.named(BANK_FILE), self.manifest.backbone_classes
        bank = tensors_of(self.read(name), self.path / name, BundleError).get("adapter_bank")
        size = self.manifest.layout.size
        if bank is None or bank.shape[1:] != (size,) or bank.dtype != np.float32:
            found = "none" if bank is None else f"{bank.dtype} {list(bank.shape)}"
            raise BundleError(
                f"{self.path / name}: adapter_bank: expected float32 [rows, {size}], found "
                f"{found}. Export the bundle again."
            )
        for entry in self.manifest.adapters:
            if wrong := self.manifest.layout.misfit(bank, entry.row, entry.classes, backbone):
                raise BundleError(
                    f"{self.path / MANIFEST}: adapter {entry.name!r}: {wrong}. Export the bundle "
                    "again."
                )
        return bank

    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
        """Images, rows and float64 outputs of the training-time model (see `Manifest.split`)."""
        name = self.manifest.named(REFERENCE_FILE)
        tensors = tensors_of(self.read(name), self.path / name, BundleError)
        try:
            images, ids = tensors["images"], tensors["adapter_ids"]
            told, n = self.manifest.outputs.items(), len(ids)
            outputs = [tensors[name].reshape(n, *shape).reshape(n, -1) for name, shape in told]
            return images, ids, np.concatenate(outputs, axis=1)
        except (KeyError, ValueError) as error:
            raise BundleError(
                f"{self.path / name}: expected what {MANIFEST} tells: {error!r}. Export again."
            ) from error

    def parity(self) -> dict[str, Any]:
        """Content of parity.json."""
        name = self.manifest.named(PARITY_FILE)
        return json_object(self.read(name), self.path / name)

    def load_adapter(self, name: str) -> Adapter:
        """An adapter as it came to the bundle, from files of the manifest's hashes, at the strength
        that it has there."""
        names = [n for n in self.manifest.files if n.startswith(f"{ADAPTERS}/{name}/")]
        if not names:
            raise BundleError(f"{self.path / ADAPTERS / name} is missing. Export the bundle again.")
        for root in (self.path, self.path / OLD):
            if self._intact(root, names):
                adapter = load_adapter(root / ADAPTERS / name)
                if self._intact(root, names):  # nobody put another one there meanwhile
                    return at_strength(adapter, self.manifest.adapter(name).strength)
        for file in names:
            self.file(file)  # says which one is damaged
        raise self._damage(names[0], None, None)

    def _intact(self, root: Path, names: Sequence[str]) -> bool:
        try:
            return all(sha256_of(root / n) == self.manifest.files[n] for n in names)
        except OSError:
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
            before = os.stat(bundle_path(path))
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


def graph_hint(path: Path, precision: Precision) -> str:
    """What brings a graph of a precision into a bundle that lacks it, in words."""
    if precision in TYPED:
        none = " On a CPU the device openvino needs none." if precision == "bfloat16" else ""
        return f"Export the bundle again with `precisions=[{precision!r}]`.{none}"
    if precision == "float32":
        return "Export the bundle again."
    return "Add it with: " + as_code(
        "calibrate",
        path,
        data="DIR",
        settings=as_code("CalibrationSettings", precision=precision),
    )
