"""The one way a bundle on disk is changed: lock, write beside, commit by the manifest.

    with edit(path) as change:
        change.store(BANK_FILE, content)
        change.manifest = replace(change.manifest, adapters=...)

New files are written and fsynced under names of their own, then the manifest is replaced in one
step: whoever reads meanwhile has the old bundle or the new one. What the new manifest no longer
names moves into ``.old``, where those who opened the old bundle find it until the next edit. A
crash at any point leaves the old or the new bundle, and files that nobody names, which the next
edit removes: at the top those with names of ours, of adapters those that a journal has. The model
card is written again. A signature fits no more: it is hidden before the commit, removed behind it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hhdeploy.backbones.licences import CARD
from hhdeploy.bundle.card import card_of
from hhdeploy.bundle.locking import NEW_MANIFEST, WORK, put_signature_aside, tidy
from hhdeploy.bundle.locking import Progress as Progress
from hhdeploy.bundle.locking import locked as locked
from hhdeploy.bundle.manifest import (
    ADAPTERS,
    MANIFEST,
    OLD,
    PARITY_FILE,
    SIGNATURE,
    Manifest,
    name_with_digits,
    plain_name,
)
from hhdeploy.bundle.manifest import LOCK_TIMEOUT as LOCK_TIMEOUT
from hhdeploy.bundle.reading import NEW_CARD, Bundle
from hhdeploy.choices import listener, of_kind
from hhdeploy.errors import (
    AdapterError,
    BundleError,
    ConflictError,
    HhdeployError,
    WriteError,
)
from hhdeploy.files.bundle_checks import check_bundle_json
from hhdeploy.files.bundle_json import as_read, bundle_path
from hhdeploy.files.directories import ONE_NAME, is_one_name
from hhdeploy.files.journal import write_journal
from hhdeploy.files.plain import read_plain
from hhdeploy.files.scratch import scratch_directory
from hhdeploy.files.writing import (
    json_bytes,
    os_errors,
    placing,
    sha256_of,
    sha256_of_bytes,
    sync_directory,
    sync_in_place,
    write_bytes,
)


@dataclass(frozen=True)
class Basis:
    """What a long piece of work relied on, to be compared when its result is committed.

    Attributes:
        graphs: precision -> `Manifest.graph_digest`.
        adapters: name -> (row, `Manifest.adapter_digest`).
    """

    graphs: Mapping[str, str]
    adapters: Mapping[str, tuple[int | None, str]]

    @classmethod
    def of(cls, manifest: Manifest) -> Basis:
        """Of a bundle as it was read."""
        return cls(
            {precision: manifest.graph_digest(precision) for precision in manifest.graphs},
            {a.name: (a.row, manifest.adapter_digest(a.name)) for a in manifest.adapters},
        )

    def kept_graphs(self, manifest: Manifest) -> frozenset[str]:
        """Precisions whose graph is still the one relied on."""
        return frozenset(
            p for p, digest in Basis.of(manifest).graphs.items() if self.graphs.get(p) == digest
        )

    def kept_adapters(self, manifest: Manifest) -> frozenset[str]:
        """Names of the adapters that are still in the row, and of the content, relied on."""
        now = Basis.of(manifest).adapters
        return frozenset(name for name, there in now.items() if self.adapters.get(name) == there)


class Change:
    """A change of a bundle that is not committed yet; see `edit`.

    Attributes:
        bundle: as it is on disk.
        manifest: to be committed; assign what it is to be.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self._written: list[Path] = []
        self._unsigned = False  # the signature was put aside

    def store(self, name: str, content: bytes | memoryview) -> str:
        """Write what takes the place of ``name``; the name that it has, with its digits."""
        digest = sha256_of_bytes(content)
        named = name_with_digits(name, digest)
        self._forget(name)
        if self._begin(named, digest):
            write_bytes(self.bundle.path / named, content)
        return named

    def adopt(self, name: str, file: Path, digest: str, named: str | None = None) -> str:
        """Take over a file from a `work_directory` in the place of ``name``.

        Args:
            name: of a fresh export.
            file: it is moved; sync it before, outside of the lock.
            digest: its sha256.
            named: the name it gets; None: with digits of its own.
        """
        named = named or name_with_digits(name, digest)
        self._forget(name)
        if self._begin(named, digest):
            os.replace(file, self.bundle.path / named)
        return named

    def copy_adapter(self, name: str, source: Path, hashes: Mapping[str, str]) -> None:
        """Copy an adapter directory to ``adapters/NAME``.

        Args:
            name, source, hashes: the adapter, its directory, its files' SHA-256 when it was read.

        Raises:
            AdapterError: it was changed since.
            WriteError: a folder of somebody else's is there, or a link, or another adapter's.
        """
        if os.path.lexists(folder := self.bundle.path / ADAPTERS / name):
            for other in self.bundle.manifest.adapters:
                if other.name != name and is_one_name(folder.with_name(other.name), folder):
                    raise WriteError(
                        f"{folder}: expected a place for {name!r}, found that of the adapter "
                        f"{other.name!r}: {ONE_NAME}. Add it under another name."
                    )
            raise WriteError(
                f"{folder} is there and is none of the bundle's adapters. Move it out of the "
                "bundle, and add it from there."
            )
        write_journal(self.bundle.path, [f"{ADAPTERS}/{name}/{file}" for file in hashes])
        for file, digest in hashes.items():
            content = read_plain(source / file)
            if sha256_of_bytes(content) != digest:
                raise AdapterError(
                    f"{source / file} was changed while it was read. Add the adapter again once "
                    "it is complete."
                )
            named = f"{ADAPTERS}/{name}/{file}"
            if self._begin(named, digest):
                write_bytes(self.bundle.path / named, content)

    def forget_adapter(self, name: str) -> None:
        """Name the files of ``adapters/NAME`` no more, nor what was measured of the adapter."""
        own = f"{ADAPTERS}/{name}/"
        write_journal(self.bundle.path, [n for n in self.manifest.files if n.startswith(own)])
        files = {n: d for n, d in self.manifest.files.items() if not n.startswith(own)}
        self.manifest = replace(self.manifest, files=files)
        self._forget_measured(name)

    def _forget_measured(self, name: str) -> None:
        """Another adapter of this name would have the errors of the one that is gone."""
        if not self.manifest.has(PARITY_FILE):
            return
        before = Bundle(self.bundle.path, self.manifest).parity()
        after = {**before, "stages": _of_others(before["stages"], name)}
        if pictures := before.get("pictures"):
            left = _of_others(pictures.get("answers", []), name)
            after["pictures"] = {**pictures, "answers": left}
        if after != before:
            self.store(PARITY_FILE, json_bytes(after))

    def _forget(self, name: str) -> None:
        kept = {n: d for n, d in self.manifest.files.items() if plain_name(n) != name}
        self.manifest = replace(self.manifest, files=kept)

    def _begin(self, named: str, digest: str) -> bool:
        """Enter a file; False if the bundle has it already, to the byte."""
        if os.path.isabs(named) or not {"", "..", "."}.isdisjoint(named.split("/")):
            raise WriteError(
                f"{named!r}: expected the name of a file inside of {self.bundle.path}."
            )
        self.manifest = replace(self.manifest, files={**self.manifest.files, named: digest})
        there = self.bundle.manifest.files.get(named)
        path = self.bundle.path / named
        if there == digest:
            if _is_whole(path, digest):
                return False
            path.unlink(missing_ok=True)  # damaged: who has it open keeps that
        elif there is not None:  # by chance: what is there is never written over
            raise WriteError(f"{named} is taken by another content: export the bundle again.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._written.append(path)
        return True

    def commit(self) -> None:
        """Replace the manifest, once all that it names is on the disk."""
        if self.manifest == self.bundle.manifest:
            return
        root = self.bundle.path
        self._check()
        self._renew_card()
        self._unsigned = put_signature_aside(root)
        folders = {f for path in self._written for f in path.parents if f.is_relative_to(root)}
        for folder in sorted({root, *folders}, reverse=True):  # what is inside before what names it
            sync_directory(folder)
        write_bytes(root / NEW_MANIFEST, json_bytes(self.manifest.to_json()))
        with placing(root / NEW_MANIFEST, root / MANIFEST, root):
            os.replace(root / NEW_MANIFEST, root / MANIFEST)
        sync_in_place(root / MANIFEST)

    def _check(self) -> None:
        """Raise `BundleError` for a manifest that no reader would take."""
        folders = {n.split("/")[1] for n in self.manifest.files if n.startswith(f"{ADAPTERS}/")}
        try:
            content = as_read(self.manifest.to_json())
            check_bundle_json(content)
            Manifest.from_json(content)
            for entry in () if self.manifest.whole else self.manifest.adapters:
                if entry.name not in folders:
                    raise ValueError(
                        f"adapter {entry.name!r}: expected its files in {ADAPTERS}/{entry.name}, "
                        "found none; under another name an adapter is removed and added again"
                    )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"{self.bundle.path} would have a manifest that cannot be right "
                f"({type(error).__name__}: {error}). Nothing was changed."
            ) from error

    def _renew_card(self) -> None:
        """The card of the new manifest, beside the old one. A README.md that the bundle does not
        name is its owner's."""
        root = self.bundle.path
        if CARD not in self.bundle.manifest.files and (root / CARD).exists():
            return
        files = {n: d for n, d in self.manifest.files.items() if n != CARD}
        content = card_of(Bundle(root, replace(self.manifest, files=files))).encode()
        digest = sha256_of_bytes(content)
        self.manifest = replace(self.manifest, files={**files, CARD: digest})
        if self.bundle.manifest.files.get(CARD) != digest:
            write_bytes(root / NEW_CARD, content)
            self._written.append(root / NEW_CARD)

    def undo(self, progress: Progress) -> None:
        """Remove what was written, unless it is committed by now: then the signature."""
        with contextlib.suppress(BundleError, WriteError):
            now = Bundle.open(self.bundle.path)
            tidy(now)
            if now.manifest != self.bundle.manifest:
                self.drop_signature(progress)

    def retire(self) -> None:
        """Move what the manifest names no more out of the way. Only tidiness: it may fail."""
        root = self.bundle.path
        with contextlib.suppress(OSError):
            if self.manifest != self.bundle.manifest:
                shutil.rmtree(root / OLD, ignore_errors=True)
            for name in sorted(self.bundle.manifest.files.keys() - self.manifest.files.keys()):
                # What was lost already, or lies in another user's folder, keeps nothing else.
                with contextlib.suppress(OSError):
                    (root / OLD / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(root / name, root / OLD / name)
            tidy(Bundle(root, self.manifest))

    def drop_signature(self, progress: Progress) -> None:
        """Remove the signature of a bundle that is another one now, and say so. Raises
        `WriteError`: it cannot be removed; the change is committed all the same."""
        signature = self.bundle.path / SIGNATURE
        signed = self._unsigned or signature.exists()
        if self.manifest == self.bundle.manifest or not signed:
            return
        try:
            signature.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(
                f"{self.bundle.path} was changed, and {signature}, which signs it as it was, could "
                f"not be removed: {error.strerror}. Remove it yourself."
            ) from error
        progress(f"{SIGNATURE} signed the bundle as it was and was removed: sign it again")


@contextlib.contextmanager
def edit(
    path: str | Path,
    basis: Basis | None = None,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Iterator[Change]:
    """Change a bundle; committed when the block ends, undone when it raises.

    One process at a time: the lock covers this block, so do slow work before it and say with
    ``basis`` what that work relied on. Reading needs no lock.

    Args:
        path: the bundle.
        basis: what the result was made from. Another float32 graph is refused; what became of
            the adapters and the other graphs is for the block to ask (`Basis.kept_adapters`,
            `Basis.kept_graphs`).
        lock_timeout: seconds to wait for another change to end.
        progress: called with a line after a second of waiting.

    Raises:
        ConflictError: another change did not end in time, or the graph was replaced.
        BundleError: no bundle, or a damaged manifest.
        OptionError: a basis that is none.
        WriteError: the file system refused; the bundle is as it was.
    """
    progress = listener(progress)
    root = Path(os.path.realpath(bundle_path(path)))
    basis = None if basis is None else of_kind(basis, Basis, "basis")
    with locked(root, lock_timeout=lock_timeout, progress=progress):
        bundle = Bundle.open(root)
        if basis is not None and basis.graphs["float32"] != bundle.manifest.graph_digest("float32"):
            raise _exported_again(path)
        tidy(bundle)
        change = Change(bundle)
        try:
            with os_errors(root):
                yield change
                change.commit()
        except BaseException:
            change.undo(progress)
            raise
        try:
            change.retire()
        finally:
            change.drop_signature(progress)


@contextlib.contextmanager
def settled(
    path: str | Path,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Iterator[Bundle]:
    """Hold a bundle as it is, with nothing in it that its manifest does not name: neither the
    version before nor what crashes left. Arguments and errors as `edit`."""
    root = Path(os.path.realpath(bundle_path(path)))
    with locked(root, lock_timeout=lock_timeout, progress=progress), os_errors(root):
        bundle = Bundle.open(root)
        tidy(bundle)
        shutil.rmtree(root / OLD, ignore_errors=True)
        yield bundle


@contextlib.contextmanager
def work_directory(bundle: Path) -> Iterator[Path]:
    """A scratch directory inside a bundle, for files that `Change.adopt` is to take over.

    Raises:
        ConflictError: the bundle was replaced, and the directory with it.
    """
    with contextlib.ExitStack() as stack:
        with os_errors(bundle):
            scratch = stack.enter_context(scratch_directory(bundle, WORK))
        try:
            yield scratch
        except (HhdeployError, OSError) as error:
            if scratch.is_dir():
                raise
            raise _exported_again(bundle) from error


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except OSError:
        return False


def _exported_again(path: str | Path) -> ConflictError:
    return ConflictError(
        f"{path} was exported again meanwhile, and this is the result of its old graph: nothing "
        "was written. Run the command again."
    )


def _of_others(stages: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [stage for stage in stages if stage["adapter"] != name]
