"""Large JSON to messages, in a process of its own.

A JSON parser holds the interpreter's lock from its first byte to its last: seconds for the largest
bodies, and on a thread as well as on the event loop nobody else would be answered meanwhile. The
process reads a body and gives back a message, whose tensors are arrays, or an error. It is started
by the first body that needs it, one body is read at a time, and it is ended where a client has
left, a deadline has passed or its memory has grown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from hhdeploy.runtime.serving.errors import BusyError, FailedError, RequestError, TooLargeError
from hhdeploy.runtime.serving.http.codec import read_object, read_request
from hhdeploy.runtime.serving.http.memory import give_memory_back
from hhdeploy.runtime.serving.messages import InferRequest

# Read at once: a few milliseconds.
SMALL: Final = 256 << 10
# More would wait for longer than they may.
_MOST_WAITING = 32 << 20
# Objects of JSON take up to 30 times their text.
_MEMORY = 2 << 30
# The allocator keeps what one large body took: with so much more than at its start another process
# goes on.
_KEPT = 48 << 20
_LENGTH = struct.Struct("<Q")
# Below the server's own threads.
_NICE = 5


@dataclass
class _Ticket:
    """A body's place; ``left``: nobody waits for it any more."""

    left: bool = False


class Parser:
    """Reads the bodies of one server. `close` ends what was started."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "hhdeploy-json")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        # Bytes of the bodies that the process is at or that wait for it.
        self._waiting = 0
        # The body that the process is at.
        self._current: _Ticket | None = None

    async def request(
        self, model: str, version: str, body: bytes, header_length: str | None
    ) -> InferRequest:
        """See `read_request`."""
        message: InferRequest = await self._elsewhere(
            len(body), read_request, model, version, body, header_length
        )
        return message

    async def content(self, body: bytes) -> dict[str, Any]:
        """See `read_object`."""
        if len(body) <= SMALL:
            return read_object(body)
        content: dict[str, Any] = await self._elsewhere(len(body), read_object, body)
        return content

    def close(self) -> None:
        """End the process and the thread."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
        self._thread.shutdown(wait=True)
        self._end()

    async def _elsewhere(self, size: int, read: Callable[..., Any], *arguments: object) -> Any:
        if self._waiting and self._waiting + size > _MOST_WAITING:
            raise BusyError(
                f"{self._waiting} bytes of JSON wait to be read, at most {_MOST_WAITING} may. Try "
                "again later, or send tensors as binary data."
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
                if self._current is ticket and self._process is not None:
                    self._current = None
                    # The thread waits for its end: gigabytes are not freed at once.
                    self._process.kill()
            raise
        finally:
            self._waiting -= size
            del answer  # the traceback of its exception holds this frame

    def _exchange(self, ticket: _Ticket, read: Callable[..., Any], arguments: object) -> Any:
        """On the thread: a body to the process, and what comes back."""
        process = self._process or _start()
        with self._lock:
            self._process = process
            if ticket.left:  # while the process was started
                return None
            self._current = ticket
        try:
            assert process.stdin is not None and process.stdout is not None
            _send(process.stdin, (read, arguments))
            good, found, last = _receive(process.stdout)
            if last:
                self._end()
        except (OSError, EOFError):
            self._end()
            raise FailedError("the process that reads large JSON has ended.") from None
        finally:
            with self._lock:
                given_up = self._current is not ticket
                self._current = None
            if given_up:
                self._end()
        if good:
            return found
        try:
            raise found
        finally:
            del found  # its traceback holds this frame, and that the body

    def _end(self) -> None:
        """Not on the event loop: it waits."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was not sent yet
                        stream.close()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import parse_for_parent; parse_for_parent()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )


def _send(stream: IO[bytes], content: Any) -> None:
    packed = pickle.dumps(content, protocol=5)
    stream.write(_LENGTH.pack(len(packed)))
    stream.write(packed)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return pickle.loads(content)


def parse_for_parent() -> None:
    """The process: bodies from standard input, messages to standard output, until the end."""
    os.nice(_NICE)
    give_memory_back()
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    # What is printed by mistake is no message.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    most = _resident_bytes() + _KEPT
    while True:
        try:
            read, arguments = _receive(sys.stdin.buffer)
        except EOFError:
            return
        good, found = _answer(read, arguments)
        del arguments
        _send(out, (good, found, _resident_bytes() > most))
        del found


def _resident_bytes() -> int:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # no Linux: it goes on as it is
        return 0
    return int(pages) * resource.getpagesize()


def _answer(read: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, read(*arguments)
    except RequestError as error:
        return False, error.with_traceback(None)
    except MemoryError:
        return False, TooLargeError("the JSON takes too much memory: send tensors as binary data.")
    except Exception as error:  # noqa: BLE001 - a bug: it is told where it is logged
        return False, FailedError(f"the JSON could not be read: {error}")
