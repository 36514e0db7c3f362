"""Scratch files and directories that do not outlive their process, however it ends.

Each is held with a lock of the operating system (flock) that dies with the process: what nobody
holds any more is removed by the next one that makes a scratch place of the same name there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hhdeploy.errors import WriteError

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays until somebody removes it
    fcntl = None  # type: ignore[assignment]

_TRIES = 100
# What `_made` calls its paths.
_NAME = re.compile(r"\.(?P<stem>.+)\.hhdeploy-[0-9a-f]{8}", re.DOTALL)
# What a directory under replacement is called in its scratch directory; see `directories`. Nothing
# that is made or removed in one may have this name: a repository's model may be called anything
# that begins with no dot.
RETIRED = ".replaced"


@contextlib.contextmanager
def scratch_directory(parent: Path | None, stem: str, *, retires: bool = False) -> Iterator[Path]:
    """A hidden directory of this process's own in ``parent``, removed at the end of the block.
    What cannot be removed then stays, for a sweep: the block's own error is the one to be told.

    Args:
        parent: None: the system's directory of temporary files.
        stem: what it is for; scratch that dead processes left for the same is removed first.
        retires: what is called ``stem`` moves into it, as `RETIRED`, while another takes its place;
            it is moved back, however the block ends, where none did.

    Raises:
        WriteError: it could not be moved back.
    """
    # Where everybody may write, nobody else may look into it.
    mode = 0o700 if parent is None else 0o777
    place = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(place, stem)
    path, handle = _made(place, stem, lambda path: os.mkdir(path, mode))
    try:
        yield path
    finally:
        try:
            if retires:
                _put_back(path, place / stem)
            if path.is_symlink():  # it was exchanged for one; see `directories`
                _unlink(path)
            shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            raise WriteError(
                f"{place / stem} was moved away to be replaced, was not, and could not be moved "
                f"back: {error.strerror}. It is whole, as {path / RETIRED}: move it back yourself, "
                "or run a command that writes there."
            ) from error
        finally:
            os.close(handle)


@contextlib.contextmanager
def scratch_file(parent: Path, stem: str) -> Iterator[Path]:
    """The same for a single, empty file; it may have been renamed when the block ends."""
    sweep(parent, stem)
    path, handle = _made(parent, stem, _make_file)
    try:
        yield path
    finally:
        _unlink(path)
        os.close(handle)


def cause_within(error: WriteError, scratch: Path) -> OSError | None:
    """What the system said where an error is about something in scratch, which is no place to look
    at: its maker tells it of the whole; None of any other error."""
    cause = error.__cause__
    return cause if isinstance(cause, OSError) and str(scratch) in str(error) else None


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def sweep(parent: Path, stem: str) -> None:
    """Remove the scratch that dead processes left in ``parent``; what cannot be removed stays.

    A directory that was on its way out when its process died is put back if nothing took its
    place (see `directories`).
    """
    with contextlib.suppress(OSError):
        found = [n for n in os.listdir(parent) if n.startswith(_prefix(stem))]
        for name in found:
            _remove_if_dead(parent / name, parent / stem)


def sweep_all(parent: Path) -> None:
    """The same of whatever it was for: of a directory in which nobody else has scratch."""
    with contextlib.suppress(OSError):
        found = [m for n in os.listdir(parent) if (m := _NAME.fullmatch(n))]
        for name in found:
            _remove_if_dead(parent / name[0], parent / name["stem"])


def _remove_if_dead(path: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # held, somebody else's, or gone by now
        handle = _hold(path)
        try:
            if not path.is_dir():
                os.unlink(path)
                return
            _put_back(path, target)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _put_back(path: Path, target: Path) -> None:
    """Undo a replacement of which only the first half was done. Raises `OSError`."""
    if (path / RETIRED).is_dir() and not os.path.lexists(target):
        os.rename(path / RETIRED, target)


def _prefix(stem: str) -> str:
    return f".{stem}.hhdeploy-"


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))


def _made(parent: Path, stem: str, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new path, and the open handle that holds it."""
    for _ in range(_TRIES):
        path = parent / f"{_prefix(stem)}{secrets.token_hex(4)}"
        try:
            make(path)
            return path, _hold(path, by_maker=True)
        except (FileExistsError, FileNotFoundError, BlockingIOError):
            if not parent.is_dir():
                raise
            # The name is taken, or a sweep came between making and holding it.
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(parent / _prefix(stem)))


def _hold(path: Path, *, by_maker: bool = False) -> int:
    """Lock a path for as long as the handle is open.

    Where nothing can be locked the maker gets a handle all the same, and nobody sweeps.

    Raises:
        BlockingIOError: a living process holds it.
        FileNotFoundError: it is gone, or another one by now.
        OSError: it cannot be opened or locked.
    """
    # Where everybody may write, anybody may make a pipe, which would be waited for.
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | careful)
    try:
        try:
            _flock(handle)
        except BlockingIOError:
            raise
        except OSError:
            if not by_maker:
                raise
        if not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _flock(handle: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def held_file(path: Path) -> Iterator[None]:
    """A file that one process at a time has, with its number in it; gone after the block. Where
    nothing can be locked nobody is kept out.

    Raises:
        BlockingIOError: a living process has it.
        OSError: it cannot be made.
    """
    for _ in range(_TRIES):
        try:
            _make_file(path)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                dead = _hold(path, by_maker=True)
                path.unlink()
                os.close(dead)
            continue
        # Another one may take a file that nobody holds yet for that of a dead process.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            handle = _hold(path, by_maker=True)
            break
    else:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
    try:
        path.write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        _unlink(path)
        os.close(handle)


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process is in this block for a directory. It leaves no file there; where
    nothing can be locked nobody waits."""
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
