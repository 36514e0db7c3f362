"""The JavaScript package compiled, and asked questions in Node."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workshop import COMMAND_SECONDS, ROOT

PACKAGE = ROOT / "js"
INSTALL = "npm ci --prefix js --ignore-scripts"


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Path:
    """The package, compiled."""
    if shutil.which("node") is None:
        pytest.skip("needs node")
    if not (PACKAGE / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip(f"needs the packages that js/package.json names: {INSTALL}")
    dist = tmp_path_factory.mktemp("js") / "dist"
    compiler = PACKAGE / "node_modules" / ".bin" / "tsc"
    built = subprocess.run(
        [compiler, "-p", PACKAGE, "--outDir", dist],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS,
    )
    assert built.returncode == 0, built.stdout
    return dist


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


def encoded(array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def decoded(answer: str, *shape: int):
    assert isinstance(answer, str), answer
    return np.frombuffer(base64.b64decode(answer), np.float32).reshape(shape)


def sent(pictures) -> list[dict[str, Any]]:
    return [
        {"data": encoded(np.asarray(p)), "width": p.width, "height": p.height} for p in pictures
    ]
