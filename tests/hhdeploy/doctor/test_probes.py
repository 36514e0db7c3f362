"""The probes behind `hhdeploy doctor`: what is absent, what is broken, what really builds.

What a working GPU answers is not tested here: nothing pretends to be one.
"""

from __future__ import annotations

import ctypes
import json
import sys

import pytest

from hhdeploy.doctor import examining as doctor
from hhdeploy.doctor import probes
from hhdeploy.doctor.probes import Driver, Probed
from tests.workshop import ROOT, run_command

CUDA_12 = Driver("ok", "driver for CUDA 12.4", (12, 4))


def probe(name, *paths):
    """The probe in a process of its own, ``paths`` before everything installed."""
    done = run_command([sys.executable, "-m", "hhdeploy.doctor.probes", name], path=(*paths, ROOT))
    assert done.returncode == 0, done.stderr
    return Probed(**json.loads(done.stdout))


class BrokenLibrary:
    """A driver's library that reports an error from its first call on."""

    def __init__(self, status):
        self.cuInit = lambda flags: status

    def cuDriverGetVersion(self, version):  # noqa: N802 - CUDA's name
        version._obj.value = 12040

    def cuGetErrorString(self, status, text):  # noqa: N802 - CUDA's name
        text._obj.value = b"what the driver says"


@pytest.fixture
def library(monkeypatch):
    """Replaces the driver's library by one that fails with a status."""

    def replace(status):
        monkeypatch.setattr(ctypes, "CDLL", lambda name: BrokenLibrary(status))

    return replace


# -- the driver ---------------------------------------------------------------------------------


def test_no_driver_is_absent_and_names_its_library(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    found = probes.find_driver()
    assert (found.state, found.cuda, found.gpus) == ("absent", None, ())
    assert "libcuda.so.1" in found.detail or "nvcuda.dll" in found.detail


def test_a_driver_without_a_gpu_is_absent(library):
    library(100)
    found = probes.find_driver()
    assert (found.state, found.cuda, found.gpus) == ("absent", (12, 4), ())
    assert "CUDA_VISIBLE_DEVICES" in found.detail


def test_a_driver_that_does_not_start_is_a_problem_in_its_own_words(library):
    library(803)
    found = probes.find_driver()
    assert found.state == "problem"
    assert "what the driver says (803)" in found.detail


# -- cuda-bindings ------------------------------------------------------------------------------


def test_bindings_newer_than_the_driver_are_a_problem(monkeypatch):
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    monkeypatch.setattr(probes.importlib.metadata, "version", lambda package: "13.5.0")
    monkeypatch.setattr(probes, "find_driver", lambda: CUDA_12)
    found = probes.probe_bindings()
    assert found.state == "problem"
    assert "cuda-bindings<13" in found.detail
    monkeypatch.setattr(probes.importlib.metadata, "version", lambda package: "12.9.0")
    assert probes.probe_bindings() == Probed("ok", "12.9.0")


def test_bindings_that_do_not_import_are_a_problem(tmp_path):
    if probe("cuda-bindings").state != "ok":
        pytest.skip("cuda-bindings is not installed")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").write_text("raise ImportError('libfoo.so is missing')")
    found = probe("cuda-bindings", tmp_path)
    assert found.state == "problem"
    assert "libfoo.so is missing" in found.detail


# -- TensorRT -----------------------------------------------------------------------------------


def test_the_tried_graph_is_valid_onnx():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(probes.NEGATION)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Neg"]


@pytest.mark.parametrize(("backend", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_missing_tensorrt_is_absent_with_its_extra(monkeypatch, backend, extra):
    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda module: None)
    assert probes.probe_tensorrt(backend) == Probed(
        "absent", f"not installed: pip install 'hhdeploy[{extra}]'"
    )


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_tensorrt_that_does_not_import_is_a_problem(tmp_path, backend):
    module = tmp_path / f"{backend.replace('-', '_')}.py"
    module.write_text("raise ImportError('libnvinfer.so.10 is missing')")
    found = probe(backend, tmp_path)
    assert found.state == "problem"
    assert "libnvinfer.so.10 is missing" in found.detail


def test_tensorrt_rtx_really_builds():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    found = probe("tensorrt-rtx")
    assert found.state == "ok", found.detail
    assert "builds for sm75, sm80" in found.detail
    assert "not for sm90" in found.detail


def test_tensorrt_rtx_for_a_newer_cuda_than_the_driver_s_is_a_problem(monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setattr(probes, "find_driver", lambda: CUDA_12)
    monkeypatch.setattr(
        probes.importlib.metadata,
        "packages_distributions",
        lambda: {"tensorrt_rtx": ["tensorrt-rtx-cu13"]},
    )
    found = probes.probe_tensorrt("tensorrt-rtx")
    assert found.state == "problem"
    assert "needs a driver for CUDA 13, this one is for 12" in found.detail


# -- the doctor around them ---------------------------------------------------------------------


def test_a_probe_that_crashes_is_a_problem_of_its_own():
    found = doctor._probe("it", "import os; os.abort()")
    assert found.state == "problem"
    assert "crashed" in found.detail


def test_a_probe_that_hangs_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "_PATIENCE_S", 0.2)
    assert doctor._probe("it", "import time; time.sleep(9)").state == "problem"
