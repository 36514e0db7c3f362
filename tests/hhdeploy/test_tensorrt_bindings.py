"""TensorRT's bindings behind one name: versions, what is missing, and its messages."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from hhdeploy.errors import MissingDependencyError
from hhdeploy.packages import Log, import_tensorrt
from tests.workshop import run_python


def fake(monkeypatch, module, version):
    stand_in = ModuleType(module)
    stand_in.__version__ = version
    monkeypatch.setitem(sys.modules, module, stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("backend", "module", "version"),
    [
        ("tensorrt", "tensorrt", "10.3.0"),
        ("tensorrt", "tensorrt", "10.13.2.6"),
        ("tensorrt", "tensorrt", "11.4.0"),
        ("tensorrt-rtx", "tensorrt_rtx", "1.2.0.54"),
        ("tensorrt-rtx", "tensorrt_rtx", "1.10.0"),
        ("tensorrt-rtx", "tensorrt_rtx", "2.0.0rc1"),
    ],
)
def test_versions_that_are_new_enough(monkeypatch, backend, module, version):
    stand_in = fake(monkeypatch, module, version)
    assert import_tensorrt(backend) is stand_in


@pytest.mark.parametrize(
    ("backend", "module", "version", "extra"),
    [
        ("tensorrt", "tensorrt", "10.2.9", "tensorrt"),
        ("tensorrt", "tensorrt", "8.6.1", "tensorrt"),
        ("tensorrt-rtx", "tensorrt_rtx", "1.1.1.26", "rtx"),
    ],
)
def test_versions_that_are_too_old(monkeypatch, backend, module, version, extra):
    fake(monkeypatch, module, version)
    with pytest.raises(MissingDependencyError, match=rf"{version}.*'hhdeploy\[{extra}\]'"):
        import_tensorrt(backend)


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [("tensorrt", "tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx", "rtx")],
)
def test_what_is_not_installed_names_the_extra(monkeypatch, backend, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'hhdeploy\[{extra}\]'"):
        import_tensorrt(backend)


# --- the real bindings --------------------------------------------------------------------------


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


def test_the_installed_bindings_are_new_enough(rtx):
    assert import_tensorrt("tensorrt-rtx") is rtx


def test_messages_by_severity(rtx):
    log = Log()
    logger = log.logger(rtx)
    said = {
        name: f"a {name} message"
        for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    }
    for name, message in said.items():
        logger.log(getattr(rtx.ILogger, name), message)
    assert log.errors == [said["INTERNAL_ERROR"], said["ERROR"]]
    assert log.warnings == [said["WARNING"]]


def test_an_error_that_is_repeated_is_quoted_once():
    assert Log(errors=["b", "a", "b"]).text() == "b\na"


def test_tensorrt_itself_writes_to_the_log(rtx):
    """An engine that is none: refused, and the reason is in the log."""
    log = Log()
    runtime = rtx.Runtime(log.logger(rtx))
    assert runtime.deserialize_cuda_engine(b"not an engine") is None
    assert log.text()


_GARBAGE = """
import gc
from hhdeploy.exporters.engine import new_builder
from hhdeploy.packages import Log, import_tensorrt

trt = import_tensorrt("tensorrt-rtx")

class Logger(trt.ILogger):
    def log(self, severity, message):
        gc.collect()  # as Python may anywhere

gc.disable()
kept = [trt.Builder(Log().logger(trt))]
kept.append(kept)
del kept
new_builder(trt, Logger(), Log())
print("there")
"""


def test_a_builder_that_is_garbage_does_not_stop_the_next_one(rtx):
    """Its end waits for the lock under which the next one's logger is called."""
    assert run_python(_GARBAGE).stdout.split() == ["there"]
