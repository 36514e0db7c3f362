"""An adapter's directory as a whole: what of it a bundle takes, and what may be in its place."""

from __future__ import annotations

import os
from pathlib import Path

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE, read_config
from hhdeploy.errors import AdapterError
from hhdeploy.files.directories import Replaceable, strangers
from hhdeploy.files.plain import plain_files
from hhdeploy.files.writing import is_folder

# Of `train`: the only file of a linear probe.
METRICS_FILE = "metrics.json"


def adapter_files(directory: Path, bundle: Path) -> list[str]:
    """Names of an adapter directory's plain files; none where there is no directory.

    Args:
        directory: the adapter's.
        bundle: that is to have them.

    Raises:
        AdapterError: the bundle is in that directory, a name that no bundle has, or a folder that
            cannot be read.
    """
    if not is_folder(directory, AdapterError):
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


def _foreign(path: Path) -> str | None:
    """Why a directory is neither an adapter nor a linear probe of `train`, or None."""
    found = {entry.name for entry in path.iterdir()}
    if found == {METRICS_FILE}:
        return None
    try:
        read_config(path / CONFIG_FILE)
    except AdapterError:
        return f"it has no {CONFIG_FILE} of peft_type HTA that can be read"
    return strangers(path, {CONFIG_FILE, TENSOR_FILE, METRICS_FILE}, "no adapter has")


# What `import`, `train` and `save_adapter` may replace.
ADAPTER = Replaceable("an adapter directory", _foreign, last=CONFIG_FILE)
