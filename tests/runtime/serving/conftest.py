"""Servers that the tests of the wires share."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.serving.servers import Server, running_server

# What a local cluster has by default. Before Ray is imported here: a test joins such a cluster.
os.environ.setdefault("RAY_AUTH_MODE", "token")


@pytest.fixture(scope="session")
def server(branches: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundle `branches` as it is served by default. Read only: no adapter is changed."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(branches, log, "--model-name", "tiny") as started:
        yield started


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Encoded pictures of all formats and of several sizes."""
    random = np.random.default_rng(3)
    found = []
    for form, size in (("PNG", (40, 52)), ("JPEG", (70, 31)), ("WEBP", (33, 47))):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(file, form)
        found.append(file.getvalue())
    return found
