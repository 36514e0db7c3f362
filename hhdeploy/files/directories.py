"""Directories that appear whole, at once, and replace only what hhdeploy wrote itself.

A new directory is made beside its place and renamed there: rename(2) refuses a target that is
not an empty directory, at that very moment. With ``overwrite`` the two are exchanged in one step
(renameat2). Where the system has no exchange, the old one is moved away first, and for that
moment nothing is in its place; what a crash leaves of that moment the next command puts back.
An empty directory in which this process stands is filled instead, and stays the same directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hhdeploy.errors import ConflictError, OccupiedError, WriteError, abbreviate
from hhdeploy.files.outputs import check_outside
from hhdeploy.files.scratch import RETIRED, cause_within, scratch_directory, sweep
from hhdeploy.files.writing import os_errors, placing, sync_directory, sync_in_place, sync_tree

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# A kernel or a file system that cannot exchange says one of these.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP}
# Of a file system that knows no case, or spells letters in its own way.
ONE_NAME = "the file system takes names for one that differ in case or in how letters are spelt"


def _unlocked(path: Path, *, lock_timeout: float = 0.0) -> contextlib.AbstractContextManager[None]:
    """Of what nobody changes."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Replaceable:
    """What a writer of directories may replace with ``overwrite``.

    Attributes:
        what: in words, e.g. ``a bundle``.
        foreign: why a directory is not one that hhdeploy wrote, or None if it is.
        locked: held while it is judged and replaced, so that nobody changes it meanwhile; with
            ``lock_timeout`` it raises `ConflictError` after so many seconds.
        last: the file without which a directory is none of these; where a directory has to be
            filled file by file, it comes last.
    """

    what: str
    foreign: Callable[[Path], str | None]
    locked: Callable[..., contextlib.AbstractContextManager[object]] = _unlocked
    last: str = ""


def strangers(
    path: Path,
    known: Collection[str],
    which: str,
    passing: Callable[[str], bool] = lambda name: False,
) -> str | None:
    """Of `Replaceable.foreign`: what in a directory is none of ``known``, or None.

    Args:
        path: the directory.
        known: names relative to it, with slashes; the folders that these are in are known as well.
        which: of the others, in words, e.g. ``the page does not have``.
        passing: whether a name that is not known is none of a stranger's.
    """
    folders = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents}
    found = set(_held_by(path)).difference(known, folders)
    other = sorted(name for name in found if not passing(name))
    return f"it holds {abbreviate(other, 3)}, which {which}" if other else None


def _held_by(path: Path) -> Iterator[str]:
    """Names of all that would be lost with a directory: files, links, pipes, empty folders."""
    for folder, below, names in os.walk(path):
        place = Path(folder)
        leaves = [*names, *(name for name in below if (place / name).is_symlink())]
        yield from ((place / name).relative_to(path).as_posix() for name in leaves)
        if not below and not names:
            yield place.relative_to(path).as_posix()


def check_target(target: Path, kind: Replaceable, *, overwrite: bool) -> Path:
    """Where a new directory goes; what can be refused before any work is.

    A link is replaced itself, never what it leads to, which may be anybody's. What somebody is
    changing at the moment is judged when it is replaced.

    Raises:
        OccupiedError: something is there that may not be replaced.
        WriteError: it exists, and nothing is to be; or this process stands in it.
    """
    path = _place(target, overwrite=overwrite)
    if overwrite:
        with contextlib.suppress(ConflictError), kind.locked(path, lock_timeout=0.0):
            _judge(target, path, kind)
    return path


def _place(target: Path, *, overwrite: bool) -> Path:
    """A target's path, its parents' links resolved.

    Raises:
        OccupiedError: a file is there.
        WriteError: it is inside of a bundle, or, without ``overwrite``, anything but an empty
            directory.
    """
    absolute = Path(os.path.abspath(target))
    path = Path(os.path.realpath(absolute.parent)) / absolute.name
    check_outside(target)
    sweep(path.parent, path.name)
    if not os.path.lexists(path):
        return path
    if not path.is_dir():
        what = "is a file, not a directory"
        raise OccupiedError(f"{target} {what}. Choose another output directory.", f"it {what}")
    if not overwrite and not _is_empty(path):
        raise _exists(target)
    return path


def _is_empty(path: Path) -> bool:
    with os_errors(path):
        return not path.is_symlink() and not os.listdir(path)


def _judge(target: Path, path: Path, kind: Replaceable) -> None:
    """Raise `OccupiedError` for a directory that is none of a kind, `WriteError` for one that this
    process stands in, or may not remove."""
    if not os.path.lexists(path) or _is_empty(path):
        return
    reason = kind.foreign(path)
    if reason is not None:
        raise OccupiedError(
            f"{target} is not {kind.what} that hhdeploy wrote: {reason}. `overwrite=True` replaces "
            "nothing else. Choose another output directory, or remove this one yourself.",
            reason,
        )
    check_removable(path)
    if _stood_in(path):
        raise WriteError(
            f"{target} is the directory you are in, or above it, and replacing it would leave you "
            "in one that is removed. Go to another directory, and name it from there. Nothing was "
            "changed."
        )


def check_removable(path: Path) -> None:
    """Raise `WriteError` for a directory that this user may not remove with all that it holds: it
    would stay, hidden, or as nobody's. Of a link, which is removed itself, only that is asked."""
    if not os.path.lexists(path):
        return
    with os_errors(path):
        below = [] if path.is_symlink() else os.walk(path, onerror=_raise)
        held = (folder for folder, folders, names in below if folders or names)
        for folder in (path.parent, *map(Path, held)):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise WriteError(
                    f"{path}: expected a directory that you may remove, found that you may not "
                    f"change {folder}, which belongs to user {folder.stat().st_uid}. Let its owner "
                    "do it, or have its permissions changed. Nothing was changed."
                )


def _raise(error: OSError) -> None:
    raise error


def _stood_in(path: Path) -> bool:
    """Whether this process, and so the shell that started it, stands in a directory or below, whose
    path is that of `_place`: nobody stands in a link, but where it leads to."""
    try:
        return Path.cwd().is_relative_to(path)
    except FileNotFoundError:  # it was removed
        return False


@contextlib.contextmanager
def atomic_directory(target: Path, *, overwrite: bool, kind: Replaceable) -> Iterator[Path]:
    """Yield a scratch directory beside ``target`` that becomes ``target`` on success.

    On any error the scratch directory is removed and what is at ``target`` stays as it was.

    Raises:
        WriteError: ``target`` exists (an empty directory is fine), with ``overwrite`` also one
            that is not of this ``kind``; or the file system refused.
    """
    path = check_target(target, kind, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(scratch_directory(path.parent, path.name))
        with os_errors(path):
            with _told_of_the_whole(scratch):
                yield scratch
            sync_tree(scratch)
            with placing(scratch, path, target):
                _install(scratch, path, kind, overwrite=overwrite)
            sync_in_place(path)


@contextlib.contextmanager
def _told_of_the_whole(scratch: Path) -> Iterator[None]:
    """Around what writes into scratch: a file in it, which is gone in a moment, is no place to look
    at, and neither written nor as it was before. The `OSError` behind is for the whole."""
    try:
        yield
    except WriteError as error:
        if (cause := cause_within(error, scratch)) is not None:
            raise cause from None
        raise


def remove_directory(target: Path, kind: Replaceable) -> None:
    """Remove a directory that hhdeploy wrote, at once: away from its name first.

    Raises:
        WriteError: it is not of this ``kind``, or the file system refused.
    """
    path = check_target(target, kind, overwrite=True)
    with os_errors(path), kind.locked(path):
        _judge(target, path, kind)
        with (
            scratch_directory(path.parent, path.name) as scratch,
            contextlib.suppress(FileNotFoundError),  # another process removed it
        ):
            os.rename(path, scratch / path.name)
        sync_directory(path.parent)


def _install(scratch: Path, path: Path, kind: Replaceable, *, overwrite: bool) -> None:
    if path.is_dir() and not path.is_symlink() and not os.listdir(path) and _stood_in(path):
        _fill(scratch, path, kind)
        return
    try:
        os.rename(scratch, path)  # onto nothing, or an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not overwrite:
            raise _exists(path) from error
    with kind.locked(_place(path, overwrite=True)):
        _judge(path, path, kind)
        try:
            _exchange(scratch, path)
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
            _replace(scratch, path)


def _fill(scratch: Path, path: Path, kind: Replaceable) -> None:
    """Into an empty directory that stays itself: a rename would remove the one a shell is in."""
    moved: list[str] = []
    try:
        for name in sorted(os.listdir(scratch), key=lambda name: (name == kind.last, name)):
            os.rename(scratch / name, path / name)
            moved.append(name)
        sync_directory(path)
    except BaseException:
        for name in moved:
            os.rename(path / name, scratch / name)
        raise


def check_place(scratch: Path, name: str) -> None:
    """Raise `WriteError` where something is by the name of what comes next into a directory that
    was empty, and gets every name once: another name is the same there."""
    if os.path.lexists(scratch / name):
        raise WriteError(
            f"{scratch.parent}: {name}: expected a place for each of the bundle's files, found "
            f"that of another: {ONE_NAME}. Choose a place elsewhere, or give adapters other names."
        )


def is_one_name(one: Path, other: Path) -> bool:
    """Whether two names of folders in one directory are one there. A link is another name."""
    try:
        return not other.is_symlink() and os.path.samefile(one, other)
    except OSError:
        return False


def _exists(path: Path) -> WriteError:
    return WriteError(
        f"{path} already exists. Choose another output directory, or pass `overwrite=True` to "
        "replace it once the new one is complete."
    )


def _replace(scratch: Path, path: Path) -> None:
    """Without an exchange: away with the old one, then in with the new one."""
    with scratch_directory(path.parent, path.name, retires=True) as retired:
        os.rename(path, retired / RETIRED)
        os.rename(scratch, path)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step. Raises `OSError`, also where the system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one))
    paths = (os.fsencode(one), os.fsencode(other))
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    function = getattr(libc, "renameat2", None)
    if function is not None:
        function.argtypes = [
            ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint,
        ]  # fmt: skip
    return function
