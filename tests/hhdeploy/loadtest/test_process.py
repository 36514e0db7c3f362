"""A server in a process of its own: started, stopped, and told when it does not start."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from hhdeploy.errors import SessionError
from hhdeploy.loadtest.process import running_server

_PATIENCE = 60.0
_SERVER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
print("at http://127.0.0.1:1234", flush=True)
while True:
    time.sleep(0.01)
"""


# Starts a server and says so.
_BENCH = """
import sys, time
from pathlib import Path
from hhdeploy.loadtest.process import running_server
with running_server([sys.executable, "-c", sys.argv[1], "0"], Path(sys.argv[2])):
    print("started", flush=True)
    time.sleep(600)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@pytest.mark.parametrize("code", [0, 3])
def test_it_gives_the_address_and_the_exit_code(tmp_path, code):
    with running_server(python(_SERVER, str(code)), tmp_path / "log") as server:
        assert server.url == "http://127.0.0.1:1234"
        assert server.code is None
    assert server.code == code


def test_a_server_that_does_not_start_says_why(tmp_path):
    command = python("raise SystemExit('no such bundle')")
    with (
        pytest.raises(SessionError, match="did not start: no such bundle"),
        running_server(command, tmp_path / "log"),
    ):
        pass


def test_a_server_stops_when_who_started_it_is_killed(tmp_path):
    server = f"""
import atexit
from hhdeploy.loadtest.process import stop_with_input
stop_with_input()
atexit.register(lambda: sys.stderr.write("stopped"))
{_SERVER}"""
    log = tmp_path / "log"
    command = python(_BENCH, server, str(log))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == b"started\n"
        assert log.read_text() == ""
        bench.kill()
    end = time.monotonic() + _PATIENCE
    while log.read_text() != "stopped":
        assert time.monotonic() < end, "the server is still there"
        time.sleep(0.01)
