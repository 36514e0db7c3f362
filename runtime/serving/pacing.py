"""What takes milliseconds to make, on the event loop, however often it is asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")
# Of the time at most this share goes into it.
SHARE: Final = 0.1


class Paced(Generic[T]):
    """Calls ``make`` so often that it takes a tenth of the time at most.

    Who asks when it is too early waits, and all who wait get the same: never what was made before
    they asked. Belongs to one event loop.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._next: asyncio.Task[T] | None = None
        self._free_at = 0.0

    async def __call__(self) -> T:
        """What ``make`` gives, or raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._in_time())
        return await asyncio.shield(self._next)  # one that leaves ends nobody else's wait

    async def _in_time(self) -> T:
        await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))
        self._next = None
        begin = time.monotonic()
        try:
            return self._make()
        finally:
            end = time.monotonic()
            self._free_at = end + (end - begin) * (1 / SHARE - 1)
