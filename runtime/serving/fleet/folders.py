"""Adapters on disk: where they are, whether they changed, reading and writing them.

An adapter is a folder with two files, in the bundle or in the fleet directory; the fleet
directory's goes before the bundle's of the same name. Everything here blocks: the fleet calls it
on a thread of its own.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from hhdeploy.adapters.checks import check_name
from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.adapters.directory import ADAPTER
from hhdeploy.backbones.licences import CARD
from hhdeploy.bundle import Bundle
from hhdeploy.errors import AdapterError, BundleError, ConflictError, HhdeployError, PlanError
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.folders import is_visible
from hhdeploy.files.writing import sha256_of
from hhdeploy.runtime.bank import AdapterBank, Packed
from hhdeploy.runtime.serving.errors import FailedError, LoadFailedError

_LOG = logging.getLogger("hhdeploy.serve.fleet")
# What a change of an adapter's files cannot leave as it was, of each file: which one it is, its
# size, and its times. Whoever writes may set the time of a change of content back, as archives and
# copies that keep times do; that of any change is the kernel's own.
_FileStamp = tuple[int, int, int, int, int]
Stamp = tuple[_FileStamp, ...]
_FILES = (CONFIG_FILE, TENSOR_FILE)
# All that is opened in a folder: its model card may state a licence.
_READ = (*_FILES, CARD)
_ABSENT: _FileStamp = (0, 0, 0, 0, 0)
_TRIES = 3
# Of a configuration: thousands of class names; and of tensors beside those of a row.
_MOST_CONFIG, _SPARE_BYTES = 4 << 20, 4 << 20
# What reading may fail with although nothing is wrong with an adapter: it may be over in a moment.
_OF_THE_MOMENT = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EIO,
    errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN,
})  # fmt: skip


class UnsettledError(AdapterError):
    """An adapter whose files are not all there, or change all the time: it may be half way
    through a replacement, and whole in a moment."""


class AwayError(LoadFailedError, UnsettledError):
    """An adapter whose fleet directory is away: for a moment, in which another one takes its place,
    or until its disk is mounted again."""


@dataclass(frozen=True)
class Source:
    """An adapter's folder as it was when it was looked at; another one if its files changed.

    Attributes:
        name: of the adapter.
        path: of its folder.
        stamp: of its files.
        bundled: it is the bundle's, so that its files have hashes to match.
        verified: from the bundle's manifest.
    """

    name: str
    path: Path
    stamp: Stamp
    bundled: bool = False
    verified: bool = False

    @property
    def whole(self) -> bool:
        """True if all its files are there."""
        return _ABSENT not in self.stamp


class AdapterFiles:
    """The folders that the adapters of one open bundle are read from.

    Attributes:
        entries: what adapters are, as they were last read.
    """

    def __init__(self, bundle: Bundle, bank: AdapterBank, directory: Path | None) -> None:
        """``directory``: the fleet directory, one adapter a folder; None: the bundle alone."""
        self._bundle = bundle
        self._bank = bank
        self._directory = directory.absolute() if directory is not None else None
        self.entries = {entry.name: entry for entry in bundle.manifest.adapters}
        # Of a model card the beginning is read, however long it is.
        self._most = {CONFIG_FILE: _MOST_CONFIG, TENSOR_FILE: _most_bytes(bank)}
        # Which directory it was when it last had adapters; None: it had none.
        self._place: tuple[int, int] | None = None
        # The name that no folder may have, and whether it was said that one has.
        self.reserved: str | None = None
        self._said = False

    def bundled(self) -> dict[str, Source]:
        """The bundle's adapters by name."""
        root = self._bundle.path / "adapters"
        return {
            a.name: Source(a.name, root / a.name, _stamp(root / a.name), True, a.verified)
            for a in self._bundle.manifest.adapters
        }

    def sources(self) -> dict[str, Source]:
        """All adapters by name. Raises `OSError` if the fleet directory cannot be read, or is the
        empty place of one that is not mounted."""
        found = self.bundled()
        if self._directory is not None:
            if os.path.isdir(self._directory) and self._is_away():
                problem = "another, empty directory is in its place, as where a disk is not mounted"
                raise FileNotFoundError(errno.ENOENT, problem, str(self._directory))
            for path in sorted(self._directory.iterdir()):
                if path.name == self.reserved:
                    self._refuse_reserved(path)
                elif _is_adapter(path):
                    # What cannot even be printed is no name either: refused when it is read.
                    name = path.name if path.name.isprintable() else ascii(path.name)
                    found[name] = Source(name, path, _stamp(path))
            had = any(not source.bundled for source in found.values())
            self._place = _identity(self._directory) if had else None
        for name in self.entries.keys() - found.keys():
            del self.entries[name]
        return found

    def find(self, name: str) -> Source | None:
        """One adapter as it is now; None if there is none, or the name is not acceptable."""
        try:
            check_name(name)
        except PlanError:
            return None
        if name == self.reserved:
            return None
        if self._directory is not None and _is_adapter(self._directory / name):
            return Source(name, self._directory / name, _stamp(self._directory / name))
        return self.bundled().get(name)

    def read(self, source: Source) -> Packed:
        """Read, check and pack an adapter.

        Files that change meanwhile may be half of the old and half of the new adapter: they are
        read again.

        Raises:
            UnsettledError: a file is not there, or they change all the time.
            LoadFailedError: the machine cannot read them now, e.g. no more file may be opened.
            AwayError: the fleet directory is not there.
            FailedError: it is the bundle's, which was changed since it was opened, or damaged.
            HhdeployError: what is wrong with its name or its files.
        """
        for _ in range(_TRIES):
            before = _stamp(source.path)
            try:
                packed = self._read(source)
            except HhdeployError as error:
                if _is_of_the_moment(error):
                    problem = (
                        f"adapter {source.name!r} cannot be read now: {error} Try again later."
                    )
                    _LOG.error(
                        "adapter not read", extra={"adapter": source.name, "problem": problem}
                    )
                    raise LoadFailedError(problem) from error
                if not source.bundled and not os.path.isdir(source.path) and self._is_away():
                    raise AwayError(
                        f"adapter {source.name!r} cannot be read now: the fleet directory is not "
                        "there, as when a disk is not mounted. Try again once it is back."
                    ) from error
                if isinstance(error, BundleError):  # the bundle's own: no request is at fault
                    raise _of_the_bundle(source.name, error) from error
                if _stamp(source.path) == before:
                    if _ABSENT in before:
                        raise UnsettledError(str(error)) from error
                    raise
            else:
                if _stamp(source.path) == before:
                    self.entries[source.name] = packed.entry
                    return packed
        raise UnsettledError(
            f"{source.path} was changed while it was read, {_TRIES} times. Write an adapter "
            "beside the fleet directory, and move its folder there when it is complete."
        )

    def _read(self, source: Source) -> Packed:
        try:
            if source.bundled:
                adapter = self._bundle.load_adapter(source.name)
                verified = source.verified
                return self._bank.pack(source.name, adapter, verified=verified, bundled=True)
            self._check_inside(source.path)
            self._check_files(source.path)
            packed = self._bank.pack(source.name, source.path, verified=source.verified)
            return _with_digest(packed, source.path)
        except HhdeployError:
            raise
        except Exception as error:
            raise _of_this_adapter(f"{source.path} cannot be read", error) from error

    def write(self, name: str, config: bytes, tensors: bytes) -> tuple[Source, Packed]:
        """Write an adapter into the fleet directory, checked before it is seen there.

        Raises:
            WriteError: the file system refused.
            FailedError: it cannot be read back, or the fleet directory is away.
            HhdeployError: the name or the adapter is not acceptable; nothing is changed.
        """
        assert self._directory is not None
        target = self._directory / check_name(name)
        if self._is_away():  # what is made in its place has none of its adapters
            raise FailedError(
                "the fleet directory is not there now, as when a disk is not mounted. Nothing was "
                "written. Upload it again once the operator has put the directory back."
            )
        with atomic_directory(target, overwrite=True, kind=ADAPTER) as scratch:
            (scratch / CONFIG_FILE).write_bytes(config)
            (scratch / TENSOR_FILE).write_bytes(tensors)
            try:
                packed = _with_digest(self._bank.pack(name, scratch), scratch)
            except HhdeployError as error:
                if _is_of_the_moment(error):
                    raise FailedError(
                        f"{name} cannot be read back from the disk: {error}"
                    ) from error
                # Not the scratch directory's name, which is gone when somebody reads it.
                raise AdapterError(str(error).replace(str(scratch), name)) from error
            except (OSError, MemoryError) as error:  # which is no failure to write
                raise FailedError(f"{name} cannot be read back from the disk: {error}") from error
            except Exception as error:
                raise _of_this_adapter(f"{name} cannot be read", error) from error
        self.entries[name] = packed.entry
        return Source(name, target, _stamp(target)), packed

    def _is_away(self) -> bool:
        """Whether the fleet directory is gone, or is another one than that which had adapters, and
        has none: whoever removes its adapters leaves the directory itself."""
        directory = self._directory
        if directory is None or not os.path.isdir(directory):
            return True
        if self._place is None or self._place == _identity(directory):
            return False
        return not any(map(_is_adapter, directory.iterdir()))

    def _refuse_reserved(self, path: Path) -> None:
        if not self._said:
            self._said = True
            _LOG.error(
                "adapter not loaded",
                extra={"adapter": path.name, "problem": "its name is the bundle's in the protocol"},
            )

    def _check_files(self, path: Path) -> None:
        """Refuses what is no file, e.g. a pipe that would never end, and what is too large.

        Raises:
            AdapterError: naming it.
        """
        for name in _READ:
            try:
                found = (path / name).stat()
            except FileNotFoundError:
                continue  # whoever reads says so
            if not stat.S_ISREG(found.st_mode):
                raise AdapterError(f"{path / name}: expected a file, found something else.")
            most = self._most.get(name)
            if most is not None and found.st_size > most:
                raise AdapterError(
                    f"{path / name}: {found.st_size} bytes, an adapter of this bundle has at most "
                    f"{most} there."
                )

    def _check_inside(self, path: Path) -> None:
        assert self._directory is not None
        root = self._directory.resolve()
        for file in (path, *(path / name for name in _READ)):
            # Not `resolve`, which has an error of its own for links that turn in a circle.
            if not Path(os.path.realpath(file)).is_relative_to(root):
                raise AdapterError(
                    f"{file} is a link that leads out of the fleet directory. Copy the adapter "
                    "there."
                )


def _identity(directory: Path) -> tuple[int, int]:
    found = directory.stat()
    return found.st_dev, found.st_ino


def _of_the_bundle(name: str, error: BundleError) -> FailedError:
    if isinstance(error, ConflictError):
        return FailedError(
            f"adapter {name!r} has no row now, and its files in the bundle are gone or others than "
            "when the server was started. Start the server again: it then serves the bundle as it "
            "is."
        )
    return FailedError(f"adapter {name!r} has no row now, and cannot be loaded: {error}")


def _of_this_adapter(what: str, error: Exception) -> AdapterError:
    """What came up while one adapter was read is said of that one: it stops no other, and neither
    the look through the directory nor the start. What nobody thought of is in the log as a whole.
    """
    if not isinstance(error, OSError | MemoryError):
        _LOG.error("an adapter's files raise what is not expected", exc_info=error)
    return AdapterError(f"{what}: {error}")


def _is_of_the_moment(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is the machine's, and says nothing of an adapter."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno in _OF_THE_MOMENT:
            return True
        error = error.__cause__
    return False


def _is_adapter(path: Path) -> bool:
    """Whether a folder in the fleet directory is to be one: none that is hidden, nor what a system
    or an archive left (``lost+found``, ``__MACOSX``) and has no configuration."""
    if path.name.startswith(".") or not _is_folder(path):
        return False
    return is_visible(path.name) or os.path.lexists(path / CONFIG_FILE)


def _is_folder(path: Path) -> bool:
    """True also of what cannot be looked at, e.g. a link with a name that is too long: whoever
    reads it says why."""
    try:
        return path.is_dir()
    except OSError:
        return True


def _with_digest(packed: Packed, directory: Path) -> Packed:
    digest = sha256_of(directory / TENSOR_FILE)
    return replace(packed, entry=replace(packed.entry, digest=digest))


def _most_bytes(bank: AdapterBank) -> int:
    """Of an adapter's tensors: those of a row, in float64, and as much again for their form."""
    return int(4 * bank.rows[0].nbytes + _SPARE_BYTES)


def _stamp(directory: Path) -> Stamp:
    return tuple(_stamp_of(directory / file) for file in _FILES)


def _stamp_of(file: Path) -> _FileStamp:
    try:
        found = file.stat()
    except OSError:
        return _ABSENT
    which, times = (found.st_dev, found.st_ino), (found.st_mtime_ns, found.st_ctime_ns)
    return *which, found.st_size, *times
