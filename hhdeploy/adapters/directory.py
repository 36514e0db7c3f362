"""The files of an adapter's directory that a bundle takes, the same for all that copy them."""

from __future__ import annotations

import os
from pathlib import Path

from hhdeploy.errors import AdapterError
from hhdeploy.files.plain import plain_files


def adapter_files(directory: Path, bundle: Path) -> list[str]:
    """Names of an adapter directory's plain files; none where there is no directory.

    Args:
        directory: the adapter's.
        bundle: that is to have them.

    Raises:
        AdapterError: the bundle is in that directory, a name that no bundle has, or a folder that
            cannot be read.
    """
    if not directory.is_dir():
        return []
    if Path(os.path.realpath(bundle)).is_relative_to(os.path.realpath(directory)):
        raise AdapterError(
            f"{bundle} is in the adapter's directory {directory}, all of which is copied into the "
            "bundle. Choose a place outside of it."
        )
    try:
        names = plain_files(directory)
    except OSError as error:
        raise AdapterError(f"{error.filename} cannot be read: {error.strerror}.") from error
    for name in names:
        if "\\" in name:
            raise AdapterError(
                f"{directory}: {name!r}: expected a name without a backslash, which parts folders "
                "on some systems. Rename or remove that file."
            )
    return names
