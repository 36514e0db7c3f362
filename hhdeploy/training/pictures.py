"""Which image files are one picture: named twice, linked to, or copied.

A picture that is trained on cannot judge what was learnt, under whatever name it lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hhdeploy.errors import DataError
from hhdeploy.files.writing import sha256_of


def number_pictures(paths: Iterable[Path]) -> dict[Path, int]:
    """A number for every file, the same one where the content is the same; in order of the paths.

    Only files of one size are read: no others can be alike.

    Raises:
        DataError: a file that cannot be read.
    """
    files: dict[Path, tuple[int, int]] = {}
    sizes: dict[tuple[int, int], int] = {}
    for path in dict.fromkeys(paths):
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        # On one disk a file has one number, so that what is linked to a hundred times is read once.
        files[path] = (stat.st_dev, stat.st_ino)
        sizes[files[path]] = stat.st_size
    frequency = Counter(sizes.values())
    contents: dict[tuple[int, int], object] = {}
    numbers: dict[object, int] = {}
    numbered = {}
    for path, file in files.items():
        if file not in contents:
            contents[file] = _content(path) if frequency[sizes[file]] > 1 else file
        numbered[path] = numbers.setdefault(contents[file], len(numbers))
    return numbered


def _content(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror}.")
