"""What takes long to make, on a thread: everybody else is answered meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from hhdeploy.runtime.serving.processes.threads import start_threads

T = TypeVar("T")
# Of an answer; made at once: a few milliseconds.
SMALL: Final = 64 << 10


class Aside:
    """Makes large things one after the other on a thread of its own, and small ones at once.

    The thread takes the interpreter's lock in turn with the event loop, as long as no single call
    into C takes long: make what is large in pieces. `close` ends it.
    """

    def __init__(self, name: str) -> None:
        """``name``: of the thread."""
        self._thread = start_threads(1, name)

    async def run(self, size: int, make: Callable[[], T]) -> T:
        """What ``make`` gives, or raises; ``size``: bytes that it makes, about."""
        if size <= SMALL:
            return make()
        return await asyncio.get_running_loop().run_in_executor(self._thread, make)

    def close(self) -> None:
        """Finish what was begun, and end the thread."""
        self._thread.shutdown(wait=True)
