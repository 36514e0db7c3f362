"""What is large is read in a process of its own.

A parser of JSON, or of numbers one by one, holds the interpreter's lock from its first byte to its
last: seconds for the largest bodies, and on a thread as well as on the event loop nobody else would
be answered meanwhile. The process gives back a message, whose tensors are arrays, or an error. It
is started by the first body that needs it, one body is read at a time, and it is ended where a
client has left, a deadline has passed or its memory has grown.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hhdeploy.runtime.serving.errors import BusyError, TooLargeError
from hhdeploy.runtime.serving.processes.elsewhere import Elsewhere
from hhdeploy.runtime.serving.processes.threads import start_threads

# More would wait for longer than they may.
_MOST_WAITING = 32 << 20


@dataclass
class _Ticket:
    """A body's place; ``left``: nobody waits for it any more."""

    left: bool = False


class Parser:
    """Reads the large bodies of one server. `close` ends what was started."""

    def __init__(self) -> None:
        self._thread = start_threads(1, "hhdeploy-json")
        self._lock = threading.Lock()
        self._process = Elsewhere("reads large requests")
        # Bytes of the bodies that the process is at or that wait for it.
        self._waiting = 0
        # The body that the process is at.
        self._current: _Ticket | None = None

    def close(self) -> None:
        """End the process and the thread."""
        self._process.kill()
        self._thread.shutdown(wait=True)
        self._process.end()

    async def elsewhere(self, size: int, read: Callable[..., Any], *arguments: object) -> Any:
        """What a function makes of a body in the process.

        Args:
            size: bytes that it counts as while it waits.
            read: a function of a module.
            arguments: its own.

        Raises:
            RequestError: as the function does; or too much waits, or it takes too much memory.
        """
        if self._waiting and self._waiting + size > _MOST_WAITING:
            raise BusyError(
                f"{self._waiting} bytes of JSON or typed contents wait to be read, at most "
                f"{_MOST_WAITING} may. Try again later, or send tensors as binary data."
            )
        ticket = _Ticket()
        self._waiting += size
        answer = asyncio.get_running_loop().run_in_executor(
            self._thread, self._exchange, ticket, read, arguments
        )
        del arguments
        try:
            return await answer
        except asyncio.CancelledError:
            with self._lock:
                ticket.left = True
                # Else it waits, and is not begun any more.
                if self._current is ticket:
                    self._current = None
                    self._process.kill()  # the thread waits for its end
            raise
        finally:
            self._waiting -= size
            del answer  # the traceback of its exception holds this frame

    def _exchange(
        self, ticket: _Ticket, read: Callable[..., Any], arguments: tuple[object, ...]
    ) -> Any:
        """On the thread: a body to the process, and what comes back."""
        self._process.start()
        with self._lock:
            if ticket.left:  # while the process was started
                return None
            self._current = ticket
        try:
            return self._process.call(read, *arguments)
        except MemoryError:
            raise TooLargeError(
                "the request takes too much memory: send tensors as binary data."
            ) from None
        finally:
            with self._lock:
                given_up = self._current is not ticket
                self._current = None
            if given_up:
                self._process.end()
