"""Whose picture is decoded next, on which thread.

A request takes its turn by the pixels that it has had: the next picture is the one whose request
has the fewest, it included. So a small picture goes before the second one of many, and before
large ones, whoever came first, but not for ever: a request that comes later begins with a share of
the pixels that others had meanwhile. Vast pictures have threads of their own, not all there are and
below the others in the operating system's eyes: small ones never wait for the end of one, unless
there is one thread for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from hhdeploy.runtime.serving.processes.threads import start_threads

T = TypeVar("T")
# Pixels from which a picture is vast: cameras' pictures are below.
VAST: Final = 1 << 24
# Of the threads that decode vast ones.
_NICE = 5
# A request begins with one in so many of the pixels that were begun before it came: one that waits
# is overtaken by so many times its pixels at most.
_SHARE: Final = 4
# What a picture costs at least, in pixels: it is resized to the same size as any other.
_LEAST: Final = 1 << 16


@dataclass(order=True)
class _Waiting:
    """A picture that waits; see `Decoders.begin`."""

    turn: int
    number: int
    pixels: int = field(compare=False)
    job: Callable[[], Any] = field(compare=False)
    result: asyncio.Future[Any] = field(compare=False)

    def forget(self, _: object) -> None:
        """Nothing stays of a picture whose place in the queue is still there."""
        self.job = _nothing


class Decoders:
    """Threads that decode; used on one event loop. `close` ends them.

    Attributes:
        most_vast: pictures of `VAST` or more pixels at the same time.
    """

    def __init__(self, count: int, most_pixels: int) -> None:
        """``count``: pictures at the same time. ``most_pixels``: of the vast ones together."""
        self._count, self._most = count, most_pixels
        self._small = start_threads(count, "hhdeploy-decode")
        self.most_vast = max(1, count // 2)
        self._vast = start_threads(self.most_vast, "hhdeploy-vast", _step_back)
        self._waiting: dict[bool, list[_Waiting]] = {False: [], True: []}
        self._running = {False: 0, True: 0}
        # Of all pictures, those that were begun; of the vast ones, those at work.
        self._begun = self._vast_pixels = self._taken = 0

    @property
    def first_turn(self) -> int:
        """What the turns of a request begin with that comes now."""
        return self._begun // _SHARE

    def begin(self, job: Callable[[], T], pixels: int, turn: int) -> asyncio.Future[T]:
        """The result of ``job`` on one of the threads, once it is its turn.

        One that is cancelled before gives up its place.

        Args:
            job: decodes one picture.
            pixels: that it has.
            turn: `first_turn` when its request came, and its request's pixels up to and with it.
        """
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._taken += 1
        waiting = _Waiting(turn, self._taken, pixels, job, result)
        result.add_done_callback(waiting.forget)
        heapq.heappush(self._waiting[pixels >= VAST], waiting)
        self._start()
        return result

    def close(self) -> None:
        """Finish what was begun, and end the threads."""
        self._small.shutdown(wait=True)
        self._vast.shutdown(wait=True)

    def _start(self) -> None:
        while (vast := self._next()) is not None:
            waiting = heapq.heappop(self._waiting[vast])
            pool = self._vast if vast else self._small
            self._running[vast] += 1
            self._begun += max(waiting.pixels, _LEAST)
            self._vast_pixels += waiting.pixels if vast else 0
            pool.submit(waiting.job).add_done_callback(partial(self._tell, vast, waiting))

    def _next(self) -> bool | None:
        """Whether a vast picture is next; None: nothing may begin now."""
        small, vast = (self._first(kind) for kind in (False, True))
        busy = self._running[False] + self._running[True]
        if busy >= self._count:
            return None
        if self._count == 1 and small is not None and vast is not None:
            return vast < small
        # There is always a thread for vast ones, and another one for small ones.
        room = self._count - (1 if vast and not self._running[True] else 0)
        if small is not None and (busy < room or self._count == 1):
            return False
        fits = vast is not None and (
            not self._running[True] or self._vast_pixels + vast.pixels <= self._most
        )
        if fits and self._running[True] < self.most_vast:
            return True
        return None

    def _first(self, vast: bool) -> _Waiting | None:
        queue = self._waiting[vast]
        while queue and queue[0].result.done():  # given up
            heapq.heappop(queue)
        return queue[0] if queue else None

    def _tell(self, vast: bool, waiting: _Waiting, found: Future[Any]) -> None:
        """On the picture's thread: the event loop goes on."""
        waiting.result.get_loop().call_soon_threadsafe(self._done, vast, waiting, found)

    def _done(self, vast: bool, waiting: _Waiting, found: Future[Any]) -> None:
        self._running[vast] -= 1
        self._vast_pixels -= waiting.pixels if vast else 0
        if not waiting.result.done():
            error = found.exception()
            if error is None:
                waiting.result.set_result(found.result())
            else:
                waiting.result.set_exception(error)
        self._start()


def _nothing() -> None:
    pass


def _step_back() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            now = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(now + _NICE, 19))
