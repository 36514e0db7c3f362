"""Files written whole and kept through a power cut, and content hashes.

What reaches the disk goes through `os`: `write_bytes` fsyncs the content before anything names it,
`sync_directory` makes the names last. Directories that appear whole are in `directories`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import reprlib
import stat
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hhdeploy.errors import HhdeployError, OptionError, ReadError, WriteError
from hhdeploy.files.plain import can_be_named, open_plain, plain_files, read_plain
from hhdeploy.files.scratch import scratch_directory, scratch_file

_CHUNK = 1 << 22
# What only writing runs into, whatever file it names.
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# File systems that cannot fsync (a directory, or at all) say one of these.
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES}
# Of every `placed_here` that is open, and how many of the latest paths each keeps.
_RECORDS: list[deque[Path]] = []
_MOST_PLACED = 20


def default_cache() -> Path:
    """``$HHDEPLOY_CACHE``, else ``~/.cache/hhdeploy``.

    Raises:
        WriteError: there is no home: HOME is not set and the user has none, as in some containers.
    """
    # No shell has read what a Dockerfile or .env sets.
    root = Path(os.environ.get("HHDEPLOY_CACHE") or "~/.cache/hhdeploy")
    try:
        return root.expanduser()
    except RuntimeError as error:
        raise WriteError(
            f"{root}, the cache: expected a home directory, found none: HOME is not set. Set it, "
            "or HHDEPLOY_CACHE to a directory, or work without a cache: `cache=None`."
        ) from error


def cache_of(given: str | Path | None) -> Path | None:
    """A ``cache`` parameter: "default" is `default_cache`; None and "" are none."""
    default = isinstance(given, str) and given == "default"
    return default_cache() if default else path_or_none(given, "cache")


def as_path(given: object, parameter: str, error: type[HhdeployError] = OptionError) -> Path:
    """What a user gave for a file or a directory; else ``error``. The empty string, of a variable
    that is not set, is none: `pathlib.Path` takes it for where the process is."""
    place = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if isinstance(place, str) and place and can_be_named(place):
        return Path(place)
    raise error(
        f"`{parameter}`: expected a path, found {type(given).__name__} {reprlib.repr(given)}."
    )


def is_folder(path: Path, error: type[HhdeployError]) -> bool:
    """Whether a path that a user named is a directory, or leads to one.

    Raises:
        error: nobody knows: a folder on the way may not be looked into, a name is too long, links
            go round.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}.") from reason


def path_or_none(given: object, parameter: str) -> Path | None:
    """`as_path` where there may be none: None, or "" of a variable that is not set."""
    nothing = given is None or (isinstance(given, str) and given == "")
    return None if nothing else as_path(given, parameter)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises as `open_plain`."""
    digest = hashlib.sha256()
    with open_plain(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_bytes(content: bytes | memoryview) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def os_errors(target: Path) -> Iterator[None]:
    """Around what writes ``target``: an `OSError` says what failed, where, and what to do.

    Raises:
        WriteError: the file system refused to write.
        ReadError: it refused to read some other file that ``target`` is made from.
    """
    try:
        yield
    except OSError as error:
        told = _write_error if _is_of_writing(error, target) else _read_error
        raise told(error, target) from error


def _is_of_writing(error: OSError, target: Path) -> bool:
    """A path that is named tells; an error of a stream that is open already is of what is
    written here."""
    named = [n for n in (error.filename, error.filename2) if isinstance(n, str | bytes | Path)]
    if error.errno in _WRITING or not named:
        return True
    target = Path(os.path.abspath(target))
    return any(_belongs(Path(os.path.abspath(os.fsdecode(name))), target) for name in named)


def _belongs(path: Path, target: Path) -> bool:
    """The target, something in it or around it, or its scratch beside it."""
    if path.is_relative_to(target) or target.is_relative_to(path):
        return True
    beside = path.relative_to(target.parent) if path.is_relative_to(target.parent) else None
    return beside is not None and beside.parts[0].startswith(f".{target.name}.")


def _write_error(error: OSError, target: Path) -> WriteError:
    hints = {
        errno.ENOSPC: "The disk is full, or has no room for more files (df -i): free some space or "
        "choose another directory.",
        errno.EDQUOT: "The disk quota is used up: free some space or choose another directory.",
        errno.EFBIG: "The file is larger than the file system or ulimit -f allows.",
        errno.EACCES: "Permission denied: choose a directory that you may write to.",
        errno.EROFS: "The file system is read-only: choose another directory.",
        errno.ENAMETOOLONG: "Choose a shorter one: what is new is made beside its place "
        "first, under a name of 19 bytes more.",
        errno.EISDIR: "Name a file in it, or choose another.",
        errno.EXDEV: "It is in a lower layer of an overlay, as of a container: remove it yourself.",
        errno.EBUSY: "It is in use, e.g. as a mount point: choose a directory inside it.",
    }
    hint = hints.get(error.errno or _cut_short(error))
    return WriteError(
        f"Could not write {target}: {_reason(error)}. {f'{hint} ' if hint else ''}Nothing that was "
        "there before was changed."
    )


def _cut_short(error: OSError) -> int:
    """NumPy's ``tofile`` says how far it came, of an array of any strides at which element, and not
    why it stopped: the disk took no more."""
    cut = ("requested and", "problem writing element")
    return errno.ENOSPC if any(words in str(error) for words in cut) else 0


def _read_error(error: OSError, target: Path) -> ReadError:
    return ReadError(
        f"Could not read {os.fsdecode(error.filename)}, which {target} is made from: "
        f"{_reason(error)}. Nothing was written."
    )


def _reason(error: OSError) -> str:
    return error.strerror or (os.strerror(errno.ENOSPC) if _cut_short(error) else str(error))


@contextlib.contextmanager
def temporary_directory(stem: str) -> Iterator[Path]:
    """A `scratch_directory` in the system's directory of temporary files.

    Raises:
        WriteError: there is no such directory, or it takes no more; `OSError` of anything else
            come as they are.
    """
    scratch = None
    try:
        with scratch_directory(None, stem) as scratch:
            yield scratch
    except OSError as error:
        if scratch is not None and not _is_of_scratch(error, scratch):
            raise
        # What Python looked through is in its own words, where there is none.
        where = f" in {tempfile.tempdir}" if tempfile.tempdir is not None else ""
        raise WriteError(
            f"Could not write a temporary file{where}: {_reason(error)}. Expected a directory for "
            "them that has room and may be written to: free some space there, or set TMPDIR to "
            "another."
        ) from error


def _is_of_scratch(error: OSError, scratch: Path) -> bool:
    """Otherwise than what writes a user's file, others read and print in the same block."""
    if isinstance(error.filename, str | bytes | Path):
        return _belongs(Path(os.path.abspath(os.fsdecode(error.filename))), scratch)
    return (error.errno or _cut_short(error)) in _WRITING


def copied(source: Path, target: Path) -> str:
    """Copy a file's bytes, in parts; hex SHA-256 of what was written. Nothing is fsynced."""
    digest = hashlib.sha256()
    with open_plain(source) as given, target.open("wb") as taken:
        while chunk := given.read(_CHUNK):
            digest.update(chunk)
            taken.write(chunk)
    return digest.hexdigest()


def copy_directory(source: Path, target: Path) -> None:
    """Copy a directory's `plain_files` and fsync them; the first error is raised as is.

    (`shutil.copytree` collects errors in one of its own, which no longer tells a full disk.)
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in plain_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target / name, read_plain(source / name))


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file and fsync it. It is not atomic: nothing may know its name yet."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(content).cast("B")
        while rest:
            rest = rest[os.write(handle, rest[:_CHUNK]) :]
        fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Wait until a directory's names are on the disk, where the file system can say so."""
    _sync(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def sync_in_place(target: Path) -> None:
    """`sync_directory` of what ``target`` is in, which has its new content by now.

    Raises:
        WriteError: it is written, and may be lost in a power cut.
    """
    try:
        sync_directory(target.parent)
    except OSError as error:
        raise WriteError(
            f"{target} was written, and whether it is on the disk for good could not be found out: "
            f"{_reason(error)}. Look at what is there, and at the disk: after a power cut it may "
            "be as it was before."
        ) from error


@contextlib.contextmanager
def placed_here() -> Iterator[deque[Path]]:
    """The latest files and directories of its users that this process has put in their places, or
    changed, in the block: what an interrupt does not take back."""
    record: deque[Path] = deque(maxlen=_MOST_PLACED)
    _RECORDS.append(record)
    try:
        yield record
    finally:
        _RECORDS.pop()


@contextlib.contextmanager
def placing(made: Path, place: Path, named: Path) -> Iterator[None]:
    """Around the one step that puts what was made in its place, for `placed_here`; ``named`` is
    what its user calls that. An interrupt comes before the step or after it."""
    before = os.lstat(made)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if os.path.samestat(before, os.lstat(place)):
                _record(named)
        raise
    _record(named)


def _record(named: Path) -> None:
    for record in _RECORDS:
        if named not in record:
            record.append(named)


def sync_tree(root: Path) -> None:
    """`sync_file` and `sync_directory` of all that is below a directory, and of itself."""
    for folder, _, names in os.walk(root):
        for name in names:
            sync_file(Path(folder) / name)
        sync_directory(Path(folder))


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        fsync(handle)
    finally:
        os.close(handle)


def fsync(handle: int) -> None:
    """`os.fsync`, on file systems that have it."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def check_file(target: Path) -> None:
    """Whether `atomic_file` can begin, which is to be known before slow work.

    Raises:
        WriteError: it is a directory, or the file system lets nobody write there.
    """
    with os_errors(target):
        place = _place_of(target)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if place is not None:
        with os_errors(place), scratch_file(place.parent, place.name) as scratch:
            write_bytes(scratch, b"0")  # what a full disk does not take


@contextlib.contextmanager
def atomic_file(target: Path, named: Path | None = None) -> Iterator[Path]:
    """Yield a scratch path beside ``target`` that replaces it, in one step, on success.

    A link is followed, and a file keeps its permissions. What is no plain file, a pipe or
    /dev/null, stays what it is: it is given the content once that is whole. ``named`` is what its
    user calls it, for `placed_here`; None: it is no user's.

    Raises:
        WriteError: the file system refused; the old file is there.
    """
    with os_errors(target):
        place = _place_of(target)
    if place is None:
        with temporary_directory("content") as scratch:
            yield scratch / "content"
            with os_errors(target):
                copied(scratch / "content", target)
        return
    with contextlib.ExitStack() as stack:
        with os_errors(place):
            scratch = stack.enter_context(scratch_file(place.parent, place.name))
        with os_errors(place):
            yield scratch
            sync_file(scratch)
            _keep_mode(place, scratch)
            with placing(scratch, place, named) if named else contextlib.nullcontext():
                os.replace(scratch, place)
            sync_in_place(place)


def _place_of(target: Path) -> Path | None:
    """Where a link leads, or the target; None: something there is no plain file.

    (What /dev/stdout and /dev/fd/N lead to may have no path.)
    """
    place = Path(os.path.realpath(target)) if target.is_symlink() else target
    try:
        there = os.stat(target)
    except FileNotFoundError:
        return place
    if stat.S_ISDIR(there.st_mode):
        return place  # which replacing it refuses
    plain = stat.S_ISREG(there.st_mode) and place.exists() and place.samefile(target)
    return place if plain else None


def _keep_mode(old: Path, new: Path) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError):
        os.chmod(new, stat.S_IMODE(os.stat(old).st_mode) & 0o777)


def write_json(target: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    with atomic_file(target) as scratch:
        scratch.write_bytes(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """``content`` as indented JSON, the way every file of hhdeploy has it."""
    return (json.dumps(content, indent=2) + "\n").encode()
