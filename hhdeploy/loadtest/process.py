"""A server in a process of its own, on a free port of the loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hhdeploy.errors import SessionError

_ANNOUNCED = re.compile(r"(?P<http>http://[^:\s]+:\d+)(, gRPC [^:\s]+:(?P<grpc>\d+))?")
# Longer than the server takes to give up a request that is under way.
_STOP_SECONDS = 60.0
_SHOWN = 2000


@dataclass
class Server:
    """A running server.

    Attributes:
        url: where it listens.
        grpc_port: on the same host; 0 without gRPC.
        log: file of its standard error.
        pid: of its process.
        code: its exit code, once the block that runs it is left; None: it had to be killed.
    """

    url: str
    grpc_port: int
    log: Path
    pid: int
    code: int | None = None

    def resident_bytes(self) -> int | None:
        """Memory of its process and of those that it started; None where `/proc` does not tell."""
        try:
            return _resident_bytes(self.pid)
        except OSError:
            return None


@contextlib.contextmanager
def running_server(command: Sequence[str], log: Path) -> Iterator[Server]:
    """Start a server, give it once it has announced its address, ask it to stop at the end.

    Its standard input ends with this process, however that ends: `stop_with_input` hears it.

    Args:
        command: prints a line with its address, ``http://HOST:PORT``, once it answers.
        log: file for its standard error.

    Raises:
        SessionError: it ended instead.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = _ANNOUNCED.search(line)
            if found is None:
                process.kill()  # it may have printed something else, and run on
                process.wait()
                said = line + log.read_text(errors="replace")[-_SHOWN:]
                raise SessionError(f"the server did not start: {said.strip()}")
            server = Server(found["http"], int(found["grpc"] or 0), log, process.pid)
            yield server
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.code = process.wait(_STOP_SECONDS)
        finally:
            process.kill()


def stop_with_input() -> None:
    """In the server: it is asked to stop (SIGTERM) when its standard input ends."""

    def wait() -> None:
        # Not of `sys.stdin`, whose lock a thread that waits keeps from an interpreter that ends.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _resident_bytes(pid: int) -> int:
    place = Path("/proc", str(pid))
    pages = int((place / "statm").read_text(encoding="ascii").split()[1])
    size = pages * os.sysconf("SC_PAGESIZE")
    for thread in (place / "task").iterdir():
        for started in (thread / "children").read_text(encoding="ascii").split():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                size += _resident_bytes(int(started))
    return size
