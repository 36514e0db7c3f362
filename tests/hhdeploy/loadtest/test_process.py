"""A server in a process of its own: started, stopped, and told when it does not start."""

from __future__ import annotations

import sys

import pytest

from hhdeploy.errors import SessionError
from hhdeploy.loadtest.process import running_server

_SERVER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
print("at http://127.0.0.1:1234", flush=True)
while True:
    time.sleep(0.01)
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
