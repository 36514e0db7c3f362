"""Caches on disk: entries by key, of a limited size in all, those used longest ago go first.

    ROOT/KIND/KEY       an entry: a file, or a directory of files that belong together
    ROOT/KIND/.KEY.*    what a process makes or removes right now, see `hhdeploy.files.scratch`

A cache is only speed: whatever is in it can be made again, and what cannot be stored is used all
the same, with a `CacheWarning`. So readers take no lock, and whoever uses an entry needs only to
open its files once, as an open or mapped file stays when its name is gone. An entry appears and
vanishes by one rename, whole. Whether its content is what was stored is for its reader to check,
who knows its form (`Entry.read`).

Only what is named like an entry is ever listed, counted or removed: a cache may be told to live in
a directory that has other things in it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from hhdeploy.errors import PlanError, ReadError, WriteError
from hhdeploy.files.scratch import cause_within, scratch_directory, sweep
from hhdeploy.files.writing import os_errors

T = TypeVar("T")
CacheKind = Literal["base", "calibration", "openvino", "kernels"]
# Kind -> what it holds.
KINDS: Mapping[CacheKind, str] = {
    "base": "traced backbones",
    "calibration": "calibrations",
    "openvino": "models that OpenVINO compiled",
    "kernels": "kernels that TensorRT-RTX compiled",
}
LIMIT_VARIABLE = "HHDEPLOY_CACHE_LIMIT"
# A large ViT takes 1.2 GB traced, and as much again for each way in which it is compiled.
DEFAULT_LIMIT = 10 * 1000**3

_NAME = re.compile(r"[0-9a-f]{32}(\.[a-z]+)?")
# In a scratch directory: what is made, and what goes.
_MADE, _OLD = "new", "old"
_SCRATCH = re.compile(rf"\.({_NAME.pattern})\.hhdeploy-.+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i)?)?b?", re.IGNORECASE)


class CacheWarning(UserWarning):
    """An entry was damaged and is made again, or cannot be stored."""


def key_of(*facts: str) -> str:
    """A key that depends on ``facts`` and on nothing else: 32 hex digits."""
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def size_limit() -> int:
    """Bytes that all entries of a cache may take: ``$HHDEPLOY_CACHE_LIMIT``, else 10 GB.

    Raises:
        PlanError: the variable is no size.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not text:
        return DEFAULT_LIMIT
    found = _SIZE.fullmatch(text)
    if found is None:
        raise PlanError(
            f"{LIMIT_VARIABLE}: expected a size such as 20GB, 500MB or 8GiB, found {text!r}."
        )
    number, unit, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (1 + "kmgt".index(unit.lower()) if unit else 0))


@dataclass(frozen=True)
class Entry:
    """A place in a cache; use `entry_at`.

    Attributes:
        root: of the cache.
        path: where the entry is, if it is there.
        limit: bytes that all entries together may take.
    """

    root: Path
    path: Path
    limit: int

    def read(self, load: Callable[[Path], T]) -> T | None:
        """What ``load`` makes of the entry at the path that it is given; None if there is none.

        An entry that vanishes or is replaced while it is read is read again, or is none: only
        one that stays where it is raises what ``load`` raised. ``load`` opens all that it needs,
        and checks that it is what was stored. What is no plain file is an `OSError`.
        """
        while (before := _identity(self.path)) is not None:
            try:
                _check_plain(self.path)
                found = load(self.path)
            except Exception:
                if _identity(self.path) == before:
                    raise
            else:
                with contextlib.suppress(OSError):  # a cache that may only be read is used too
                    os.utime(self.path)
                return found
        return None

    def keep(self, make: Callable[[Path], T]) -> T | None:
        """`store` what was made by long work, which a full disk does not take back.

        Args:
            make: makes the entry at the path that it is given.

        Returns:
            What ``make`` returned; None after a `CacheWarning`: the file system refused.
        """
        try:
            with self.store() as path, os_errors(self.path):
                return make(path)
        except WriteError as error:
            warnings.warn(
                f"What was made is used, and not kept for the next time. {error}",
                CacheWarning,
                stacklevel=2,
            )
        return None

    @contextlib.contextmanager
    def store(self) -> Iterator[Path]:
        """Yield a path to make the entry at, a file or a directory; it replaces an older one.

        Then those used longest ago go until all fit the limit. An entry that alone is larger is
        not kept; neither is one whose making fails.

        Raises:
            WriteError: the file system refused. The block's own `OSError` come as they are: those
                of writing belong into `hhdeploy.files.writing.os_errors`.
        """
        with self._scratch() as scratch:
            try:
                yield scratch / _MADE
            except WriteError as error:
                if (cause := cause_within(error, scratch)) is not None:
                    with os_errors(self.path):  # what is in scratch is gone in a moment
                        raise cause from None
                raise
            if _size(scratch / _MADE) <= self.limit:
                with os_errors(self.path):
                    _publish(scratch / _MADE, self.path, scratch / _OLD)
                _make_room(self.root, self.limit, keep=self.path)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        try:
            with contextlib.ExitStack() as stack:
                with os_errors(self.path):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    _sweep(self.root)
                    scratch = stack.enter_context(_scratch(self.path))
                yield scratch
        except WriteError as error:
            raise WriteError(
                f"{error} (This is a cache: set HHDEPLOY_CACHE to another directory, or do "
                "without one: `cache=None`.)"
            ) from error


@dataclass(frozen=True)
class Stored:
    """An entry that is there.

    Attributes:
        kind: of `KINDS`.
        path: its file or directory.
        size: bytes of its files.
        used: when it was stored or read last, seconds since the epoch.
    """

    kind: CacheKind
    path: Path
    size: int
    used: float


def entry_at(root: Path, kind: CacheKind, name: str) -> Entry:
    """The place of an entry.

    Args:
        root: of the cache; it need not exist.
        kind: of `KINDS`.
        name: a `key_of`, with a suffix if the entry is a file.

    Raises:
        PlanError: see `size_limit`.
    """
    assert _NAME.fullmatch(name), name  # else it would never be evicted
    return Entry(root, root / kind / name, size_limit())


def stored_in(root: Path) -> list[Stored]:
    """All entries of a cache, the one used last first.

    Raises:
        ReadError: the cache cannot be read.
    """
    try:
        return _stored_in(root)
    except OSError as error:
        raise ReadError(
            f"The cache {root} cannot be read: {error.strerror or error}. Set HHDEPLOY_CACHE to "
            "another directory."
        ) from error


def _stored_in(root: Path) -> list[Stored]:
    found = []
    for kind in KINDS:
        for path in _in(root / kind, _NAME):
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                found.append(Stored(kind, path, _size(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def _in(folder: Path, names: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if names.fullmatch(path.name)]


def clear(root: Path, kinds: Collection[str] = tuple(KINDS)) -> list[Stored]:
    """Remove all entries of some kinds, and what dead processes left half done.

    Processes that have one open keep it.

    Returns:
        The entries that were removed.

    Raises:
        WriteError: one cannot be removed; some may be gone.
    """
    removed: list[Stored] = []
    if not root.is_dir():
        return removed
    for entry in stored_in(root):
        if entry.kind in kinds:
            try:
                _remove(entry.path)
            except FileNotFoundError:
                continue  # by somebody else
            except OSError as error:
                raise WriteError(
                    f"Could not remove {entry.path} from the cache: {error.strerror or error}. "
                    "It belongs to another user, or the cache is read-only or of a container's "
                    "image."
                ) from error
            removed.append(entry)
    _sweep(root)
    return removed


def _make_room(root: Path, room: int, keep: Path) -> None:
    """Remove the entries used longest ago until those left take at most ``room`` bytes."""
    with contextlib.suppress(OSError):  # where another user's folder cannot be read
        # What was stored now stays, also beside entries whose times lie in the future.
        for entry in sorted(_stored_in(root), key=lambda entry: entry.path != keep):
            room -= entry.size
            if room < 0:
                with contextlib.suppress(OSError):  # gone by now, or another user's
                    _remove(entry.path)


def _remove(path: Path) -> None:
    with _scratch(path) as scratch:
        path.rename(scratch / _OLD)


def _publish(made: Path, path: Path, old: Path) -> None:
    if made.is_dir():  # which replaces no directory that has files in it
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
    try:
        made.replace(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # Another process has just stored the same: as good as ours.


def _scratch(path: Path) -> contextlib.AbstractContextManager[Path]:
    """For what is half made or half removed of an entry."""
    return scratch_directory(path.parent, path.name)


def _sweep(root: Path) -> None:
    """Remove what dead processes left, of whatever entry."""
    for kind in KINDS:
        with contextlib.suppress(OSError):  # another user's
            for path in _in(root / kind, _SCRATCH):
                found = _SCRATCH.fullmatch(path.name)
                assert found is not None
                sweep(path.parent, found[1])


def _check_plain(path: Path) -> None:
    """Raise `OSError` where an entry is, or holds, a pipe or the like, which would be waited for:
    where everybody may write, anybody may make one."""
    mode = path.stat().st_mode
    for file in path.iterdir() if stat.S_ISDIR(mode) else (path,):
        if not stat.S_ISREG(file.stat().st_mode):
            raise OSError(errno.EINVAL, "a plain file was expected", str(file))


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Of the very file or directory that has this name now; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a directory."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
