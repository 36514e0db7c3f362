"""Places that a user names to be written to: none of them is inside of a bundle.

A bundle is changed in one way (`hhdeploy.bundle.edit`), which hashes what it writes. A part that is
written over by anything else is damage, found when the bundle is used; with other files beside its
parts a bundle is neither signed nor replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from hhdeploy.errors import WriteError, as_code
from hhdeploy.files.bundle_json import MANIFEST
from hhdeploy.files.plain import read_plain
from hhdeploy.files.writing import atomic_file, check_file, is_folder


def check_outside(target: Path) -> None:
    """Compare a file or directory that is to be written with the bundles that it may lie in.

    Raises:
        WriteError: it is, or would be, inside of one.
    """
    if (bundle := bundle_around(target)) is not None:
        raise WriteError(
            f"{target} is inside of the bundle {bundle}: a part that is written over is damage, "
            "and with other files a bundle is neither signed nor replaced. Choose another place. "
            f"An adapter is added to it with: {as_code('add_adapter', bundle, 'NAME', 'DIR')}"
        )


def bundle_around(target: Path) -> Path | None:
    """The bundle that a path is inside of, by its own name or by what it links to; or None."""
    absolute = Path(os.path.abspath(target))
    path = Path(os.path.realpath(absolute.parent)) / absolute.name
    places = dict.fromkeys((path, Path(os.path.realpath(path))))
    return next((f for place in places for f in place.parents if _is_bundle(f)), None)


def _is_bundle(folder: Path) -> bool:
    try:
        return isinstance(json.loads(read_plain(folder / MANIFEST))["files"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def check_output(target: Path, what: str = "") -> None:
    """What of `output_file` can be refused before long work.

    Args:
        target: the file.
        what: it is, for the message: its parameter, a colon and a blank.

    Raises:
        WriteError: its folder is not there, it is inside of a bundle, or the file system lets
            nobody write there.
    """
    _check_folder(target, what)
    check_outside(target)
    try:
        check_file(target)
    except WriteError as error:
        raise WriteError(f"{what}{error}") from error


@contextlib.contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """`atomic_file` of a path that a user names.

    Raises:
        WriteError: its folder is not there, it is inside of a bundle, or the file system refused;
            the old file is there.
    """
    _check_folder(target)
    check_outside(target)
    with atomic_file(target, named=target) as scratch:
        yield scratch


def _check_folder(target: Path, what: str = "") -> None:
    folder = Path(os.path.realpath(target)).parent if os.path.islink(target) else target.parent
    if not is_folder(folder, WriteError):
        raise WriteError(
            f"{what}{target}: {folder} is not a directory. Make it first, or choose another."
        )
