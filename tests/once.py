"""What a run of the tests makes once for all of its processes, on disk.

The processes are pytest-xdist's workers, the children of `tests.alone`, and whatever a test starts.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

_PLACE = "HHDEPLOY_TESTS_ONCE"


def share_directory() -> None:
    """A directory of this run, for the processes below too; it goes with the first of them."""
    if _PLACE not in os.environ:
        os.environ[_PLACE] = tempfile.mkdtemp(prefix="hhdeploy-once-")
        atexit.register(shutil.rmtree, os.environ[_PLACE], ignore_errors=True)


@contextmanager
def traces(name: str) -> Iterator[Path]:
    """The run's cache of traced backbones, while no other process traces ``name`` for it."""
    place = Path(os.environ[_PLACE])
    with FileLock(place / f"trace of {name}.lock"):
        yield place / "traces"


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The directory ``name`` of this run, to read only: the first process that asks makes it.

    ``make`` gets its path, which is not there, and leaves there all or, when it raises, nothing
    that another process would take for all: it is made elsewhere and moved.
    """
    place = Path(os.environ[_PLACE])
    with FileLock(place / f"{name}.lock"):
        path = place / name
        if not path.exists():
            unfinished = place / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(path)
    return path
