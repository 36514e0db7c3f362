"""Places that a user names to be written to: nothing there may be a part of a bundle.

A bundle is changed in one way (`hhdeploy.bundle.edit`), which hashes what it writes; a part that is
written over by anything else is damage, found when the bundle is used.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from hhdeploy.errors import WriteError, as_code
from hhdeploy.files.bundle_json import MANIFEST, SIGNATURE, plain_name
from hhdeploy.files.plain import read_plain
from hhdeploy.files.writing import atomic_file


def check_outside(target: Path) -> None:
    """Compare a file or directory that is to be written with the bundles that it may lie in.

    Raises:
        WriteError: it is one that a bundle's manifest names, holds such, or is the manifest.
    """
    absolute = Path(os.path.abspath(target))
    path = Path(os.path.realpath(absolute.parent)) / absolute.name
    for place in {path, Path(os.path.realpath(path))}:
        for folder in place.parents:
            if _has(folder, place.relative_to(folder).as_posix()):
                raise WriteError(
                    f"{target} is a part of the bundle {folder}, which that would damage. Choose "
                    "another place. An adapter is added to it with: "
                    f"{as_code('add_adapter', folder, 'NAME', 'DIR')}"
                )


def _has(folder: Path, name: str) -> bool:
    """Whether a folder is a bundle that has something of a name, whatever digits are in it."""
    try:
        named = json.loads(read_plain(folder / MANIFEST))["files"]
        files = {plain_name(file) for file in (MANIFEST, SIGNATURE, *named)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no bundle
        return False
    name = plain_name(name)
    return any(f == name or f.startswith(f"{name}/") or name.startswith(f"{f}/") for f in files)


def check_output(target: Path, what: str = "") -> None:
    """What of `output_file` can be refused before long work.

    Args:
        target: the file.
        what: it is, for the message: its parameter, a colon and a blank.

    Raises:
        WriteError: its folder is not there, or it is a part of a bundle.
    """
    if not target.resolve().parent.is_dir():
        raise WriteError(
            f"{what}{target}: {target.parent} is not a directory. Make it first, or choose another."
        )
    check_outside(target)


@contextlib.contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """`atomic_file` of a path that a user names.

    Raises:
        WriteError: it is a part of a bundle, or the file system refused; the old file is there.
    """
    check_outside(target)
    with atomic_file(target) as scratch:
        yield scratch
