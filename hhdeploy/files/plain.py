"""Plain files, opened as what they are: a pipe in the place of one would be waited for, for ever.

What a user names by hand, and a shell may give as a pipe, `read_few` reads: never without end.

Errors are `OSError`, which names the file; callers say what it was for.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO

# Bytes of a key, a chain of certificates, a password or a list of tokens: far more than one has.
_FEW = 1 << 20

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "it is a directory"),
    (stat.S_ISFIFO, errno.EINVAL, "it is a pipe"),
    (stat.S_ISCHR, errno.EINVAL, "it is a device"),
    (stat.S_ISBLK, errno.EINVAL, "it is a device"),
)

# What a clone without Git LFS has in a large file's place, a download that got a page instead, and
# files of weights of others.
_INSTEAD = (
    (
        b"version https://git-lfs",
        "it is Git LFS's pointer to the file, which git lfs pull puts in its place",
    ),
    (b"<!doctype html", "it is a page of HTML: download the file itself"),
    (b"<html", "it is a page of HTML: download the file itself"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it"),
    (b"gguf", "it is a file of llama.cpp (GGUF)"),
    (b"\x89hdf", "it is an HDF5 file, as Keras saves one"),
)


def can_be_named(place: str) -> bool:
    """False for what no file system has: a zero byte, or half of a character."""
    try:
        return b"\0" not in os.fsencode(place)
    except UnicodeEncodeError:
        return False


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading; links are followed.

    Raises:
        OSError: it is missing, may not be read, or is a directory, a pipe or a device. What reading
            fails with later, as on a disk that is damaged, names the file as well.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(handle).st_mode
        for is_kind, number, what in _KINDS:
            if is_kind(mode):
                raise OSError(number, f"{what}; a plain file was expected", str(path))
        return BufferedReader(_Named(handle, path))
    except BaseException:
        os.close(handle)
        raise


class _Named(FileIO):
    """A file whose errors say which one it is: without, they are taken for those of what is
    written meanwhile."""

    def __init__(self, handle: int, path: Path) -> None:
        super().__init__(handle)
        self._path = str(path)

    def readinto(self, buffer: Any) -> Any:
        try:
            return super().readinto(buffer)
        except OSError as error:
            error.filename = self._path
            raise

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            error.filename = self._path
            raise


def read_plain(path: Path) -> bytes:
    """A plain file's content. Raises as `open_plain`."""
    with open_plain(path) as stream:
        return stream.read()


def read_few(path: Path, most: int = _FEW, *, plain: bool = False) -> bytes:
    """The content of a file that holds little: a key, a token, a list.

    Args:
        path: a pipe is waited for, as it is what a shell makes of ``<(command)``.
        most: bytes that it may hold; at most one byte more is read.
        plain: take a plain file alone, for who must not be kept waiting.

    Raises:
        OSError: it cannot be read, or holds more; ``plain``: it is none.
    """
    with open_plain(path) if plain else path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it holds more than {most:,} bytes", str(path))
    return content


def what_instead(path: Path) -> str | None:
    """What lies in the place of a file of tensors, in words; None: nothing that is known."""
    with open_plain(path) as stream:
        start = stream.read(64)
    if not start:
        return "it is empty"
    start = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((what for begin, what in _INSTEAD if start.startswith(begin)), None)


def ends_changed(path: Path, sha256: str) -> str | None:
    """What became of a small file of text that had this digest before its line ends were changed,
    in words; None: nothing of the kind."""
    if hashlib.sha256(read_few(path).replace(b"\r\n", b"\n")).hexdigest() != sha256:
        return None
    return (
        "its lines end as on Windows (CRLF), as git with core.autocrlf=true writes them. Clone it "
        "with git -c core.autocrlf=false clone"
    )


def plain_files(directory: Path) -> list[str]:
    """Names of the plain files below a directory, with slashes, sorted.

    Links to files are followed, links to folders are not; what is neither a file nor leads to one
    (a pipe, a dangling link) is left out, and what is hidden: a clone's .git has all that ever was
    in it, and perhaps a password. Raises `OSError` for a folder that cannot be read.
    """
    found = []
    for folder, folders, names in os.walk(directory, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder) / name for name in names if not name.startswith("."))
        found += [f.relative_to(directory).as_posix() for f in files if f.is_file()]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
