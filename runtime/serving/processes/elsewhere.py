"""Calls in a process of its own, one at a time.

What holds the interpreter's lock from its first byte to its last keeps everybody waiting, on a
thread as well as on the event loop; and what takes memory gives it back for certain where its
process ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from hhdeploy.runtime.serving.errors import FailedError, RequestError
from hhdeploy.runtime.serving.processes.memory import give_memory_back

# Of such a process. Objects of JSON take up to 30 times their text.
_MEMORY = 2 << 30
# The allocator keeps what one large call took: with so much more than at its start another process
# goes on.
_KEPT = 48 << 20
_LENGTH = struct.Struct("<Q")
# Below the server's own threads.
_NICE = 5
# Whoever signals the server's whole group (Ctrl-C, a supervisor) means the server, which needs what
# is done here to answer what it took. The process ends when the server does, or kills it.
_SERVERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Elsewhere:
    """A process that is started by the first call, and anew after one that ended it or took much.

    Used on one thread, but for `kill`.
    """

    def __init__(self, name: str) -> None:
        """``name``: what messages call what it does."""
        self._name = name
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, if there is none."""
        if self._process is None:
            process = _start()
            with self._lock:
                self._process = process

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """What a function returns there.

        Args:
            function: of a module, so that it is found by its name.
            arguments: are pickled.

        Raises:
            RequestError, MemoryError: as the function did.
            FailedError: it raised something else, or its process ended, e.g. by `kill`.
        """
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, (function, arguments))
            good, found, last = _receive(process.stdout)
        except (OSError, EOFError):
            self.end()
            raise FailedError(f"the process that {self._name} has ended.") from None
        if last:
            self.end()
        if good:
            return found
        try:
            raise found
        finally:
            del found  # its traceback holds this frame, and that the arguments

    def kill(self) -> None:
        """End what it is at, from another thread and without a wait for it."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def end(self) -> None:
        """End the process, and wait for that: gigabytes are not freed at once."""
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
    # A new process has its thread's mask, from its first moment on.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SERVERS_SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import answer_parent; answer_parent()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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


def answer_parent() -> None:
    """The process: calls from standard input, results to standard output, until the end."""
    os.nice(_NICE)
    give_memory_back()
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    # What is printed by mistake is no result.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    most = _resident_bytes() + _KEPT
    while True:
        try:
            function, arguments = _receive(sys.stdin.buffer)
        except EOFError:
            return
        good, found = _answer(function, arguments)
        del arguments
        try:
            _send(out, (good, found, _resident_bytes() > most))
        except BrokenPipeError:  # the server is gone
            os._exit(1)  # what is left in the buffer is for nobody
        del found


def _resident_bytes() -> int:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # no Linux: it goes on as it is
        return 0
    return int(pages) * resource.getpagesize()


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(*arguments)
    except RequestError as error:
        return False, error.with_traceback(None)
    except MemoryError:
        return False, MemoryError()
    except Exception as error:  # noqa: BLE001 - a bug: it is told where it is logged
        return False, FailedError(f"{function.__name__} failed: {error}")
