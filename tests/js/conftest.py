"""The JavaScript package compiled, and asked questions in Node."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import running_browser
from tests.once import made_once
from tests.workshop import COMMAND_SECONDS, ROOT

PACKAGE = ROOT / "js"
OCTETS = "application/octet-stream"
INSTALL = "npm ci --prefix js --ignore-scripts"


@pytest.fixture(scope="session")
def dist() -> Path:
    """The package, compiled."""
    if shutil.which("node") is None:
        pytest.skip("needs node")
    if not (PACKAGE / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip(f"needs the packages that js/package.json names: {INSTALL}")

    def compiled(folder: Path) -> None:
        compiler = PACKAGE / "node_modules" / ".bin" / "tsc"
        built = subprocess.run(
            [compiler, "-p", PACKAGE, "--outDir", folder],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )
        assert built.returncode == 0, built.stdout

    return made_once("js", compiled)


@pytest.fixture(scope="session")
def ask(dist):
    """Asks one Node process some questions, see js/test/ask.mjs."""

    def answers(*questions: dict[str, Any]) -> list[Any]:
        said = subprocess.run(
            ["node", PACKAGE / "test" / "ask.mjs", dist],
            input=json.dumps(questions),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)

    return answers


@pytest.fixture(scope="module")
def browser():
    """One Chromium for the tests of a file; each opens a page of its own in it."""
    with running_browser() as started:
        yield started


@pytest.fixture
def served():
    """Serves a folder as a static web server does: its address."""
    servers = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        # What the machine's own table of types does not say everywhere.
        extensions_map = {".js": "text/javascript", ".mjs": "text/javascript", "": OCTETS} | {
            ".wasm": "application/wasm",
            ".html": "text/html",
        }

        def log_message(self, *_: object) -> None:
            pass

    def start(folder: Path) -> str:
        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def encoded(array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def decoded(answer: str, *shape: int):
    assert isinstance(answer, str), answer
    return np.frombuffer(base64.b64decode(answer), np.float32).reshape(shape)


def sent(pictures) -> list[dict[str, Any]]:
    return [
        {"data": encoded(np.asarray(p)), "width": p.width, "height": p.height} for p in pictures
    ]
