"""A real server: ``hhdeploy serve`` in a process of its own, on free ports of the loopback.

And what a test needs that has one in its own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hhdeploy.cli import main
from tests.leash import leashed
from tests.runtime.serving.fleets import PATIENCE
from tests.workshop import ROOT

HHDEPLOY = (str(Path(sys.executable).with_name("hhdeploy")),)
# Of servers that allow loading.
TOKEN = "correct-horse-battery-staple"
AUTHORISED = {"authorization": f"Bearer {TOKEN}"}
_ANNOUNCED = re.compile(r"https?://(?P<host>[^:]+):(?P<http>\d+)(, gRPC [^:]+:(?P<grpc>\d+))?")


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        process: of ``hhdeploy serve``.
        http: ``host:port``, as tritonclient.http takes it.
        grpc: ``host:port``, as tritonclient.grpc takes it; "" without gRPC.
        log: file of its standard error, a JSON object a line.
    """

    process: subprocess.Popen[str]
    http: str
    grpc: str
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers (lower case), body."""
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        connection = http.client.HTTPConnection(self.http, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, content, headers or {})
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()

    def json(self, method: str, path: str, body: dict[str, Any] | None = None, **headers: str):
        """One request whose answer is JSON: status and content."""
        status, _, content = self.request(method, path, body, headers)
        return status, json.loads(content) if content else None

    def logits(self, model: str, adapter: str, images: Any) -> tuple[int, Any]:
        """Status, and the logits of one request for some images; else what the server said."""
        tensor = {
            "name": "images",
            "datatype": "FP32",
            "shape": list(images.shape),
            "data": images.ravel().tolist(),
        }
        body = {
            "inputs": [tensor],
            "outputs": [{"name": "logits"}],
            "parameters": {"adapter": adapter},
        }
        status, content = self.json("POST", f"/v2/models/{model}/infer", body)
        if status != 200:
            return status, content
        (output,) = content["outputs"]
        return status, np.asarray(output["data"], np.float32).reshape(output["shape"])

    def records(self) -> list[dict[str, Any]]:
        """The log so far: what it was told to write is written a moment later."""
        size = -1
        while size != (size := self.log.stat().st_size):
            time.sleep(0.05)
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def requests(self, count: int, *, since: int = 0) -> list[dict[str, Any]]:
        """What the log says of requests behind its first lines; ``count`` are waited for.

        An answer may arrive before its line is written.
        """
        end = time.monotonic() + PATIENCE
        while True:
            found = [r for r in self.records()[since:] if r["message"] == "request"]
            if len(found) >= count or time.monotonic() > end:
                return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop and wait: its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def running_server(
    bundle: Path, log: Path, *options: object, program: Sequence[str] = HHDEPLOY
) -> Iterator[Server]:
    """``hhdeploy serve BUNDLE OPTIONS`` until the end of the block; it must end without error."""
    command = leashed([
        *program, "serve", str(bundle), "--device", "cpu", "--threads", "1", "--http-port", "0",
        "--grpc-port", "0", "--request-seconds", str(PATIENCE), *map(str, options),
    ])  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            # Ray says things too; where it does not start, the reason comes before the end.
            lines = []
            while (found := _ANNOUNCED.search(line := process.stdout.readline())) is None:
                lines.append(line)
                assert line, f"no address in {lines}; {log.read_text()}"
            grpc = f"{found['host']}:{found['grpc']}" if found["grpc"] else ""
            yield Server(process, f"{found['host']}:{found['http']}", grpc, log)
            if process.poll() is None:
                process.terminate()
                assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()


def not_served(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, *options: object, code: int = 1
) -> str:
    """What ``hhdeploy serve BUNDLE OPTIONS``, in this process, says instead of serving.

    ``code``: of its end; 2 is what a wrong option gives.
    """
    monkeypatch.setattr("hhdeploy.runtime.serving.logs.log_as_json", lambda level: None)
    ended = CliRunner().invoke(main, ["serve", str(bundle), *map(str, options)])
    assert ended.exit_code == code and isinstance(ended.exception, SystemExit), ended.output
    assert not ended.stdout
    return ended.stderr


def signal_own_server(serving: asyncio.Task[None], number: int = signal.SIGTERM) -> None:
    """A signal to this process, for the server that is a task in it.

    Nobody else would catch it, and the whole run of the tests would end without a word: a server
    that is not there is this test's failure instead, with what it ended with. One that does not
    catch signals yet is cancelled.
    """
    if serving.done():
        serving.result()
        raise AssertionError("the server ended by itself")
    if number not in asyncio.get_running_loop()._signal_handlers:
        serving.cancel()
        raise AssertionError(f"the server does not catch {signal.Signals(number).name} yet")
    os.kill(os.getpid(), number)
