"""Open sessions that many tests of the runtime share."""

from __future__ import annotations

import pytest

from hhdeploy.runtime import Session, open_session


@pytest.fixture(scope="module")
def session(branches) -> Session:
    """All adapters, on the CPU. Tests that change adapters open their own."""
    with open_session(branches, device="cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def own(small) -> Session:
    """Alpha and gamma in a bank of four rows, free to be changed."""
    with open_session(small, device="cpu", threads=1, slots=4) as opened:
        yield opened
