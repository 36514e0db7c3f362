"""Open sessions that many tests of the runtime share."""

from __future__ import annotations

import sys

import pytest

from hhdeploy.runtime import Session, open_session
from tests.runtime.gpu_double import Cudart, TensorRt


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A kernel cache of the test's own."""
    monkeypatch.setenv("HHDEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def machine(monkeypatch, cache):
    """Stand-ins of both TensorRTs on one stand-in GPU."""
    cudart = Cudart()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cudart)
    found = {}
    for backend, module in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        found[backend] = TensorRt(module, cudart)
        monkeypatch.setitem(sys.modules, module, found[backend])
    found["cudart"] = cudart
    return found
