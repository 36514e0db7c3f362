"""Servers that the tests of the wires share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.serving.servers import Server, running_server


@pytest.fixture(scope="package")
def server(branches: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundle `branches` as it is served by default. Read only: no adapter is changed."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(branches, log, "--model-name", "tiny") as started:
        yield started
