"""Threads of a server, all of them there from its start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from hhdeploy.errors import DeviceError


def start_threads(
    count: int, name: str, begin: Callable[[], None] | None = None
) -> ThreadPoolExecutor:
    """A pool that starts no thread later, when a request waits for it and the system may have none.

    Args:
        count: of threads.
        name: that theirs begin with.
        begin: what each does first.

    Raises:
        DeviceError: the system has no more threads.
    """
    pool = ThreadPoolExecutor(count, name, begin)
    there = threading.Barrier(count + 1)
    try:
        for _ in range(count):  # each keeps the one before waiting, so that the pool starts another
            pool.submit(there.wait)
        there.wait()
    except RuntimeError as error:
        there.abort()
        pool.shutdown()
        raise DeviceError(
            f"cannot start {count} of the threads {name}: {error}. The system has no more for this "
            "user or container (ulimit -u, pids.max), or no memory for them. Allow more, or serve "
            "with fewer `decoders` or `contexts`."
        ) from error
    return pool
