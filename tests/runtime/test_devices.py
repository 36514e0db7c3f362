"""Which runtime a device name means, and ONNX Runtime's GPU providers as far as a CPU shows."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.errors import (
    BundleError,
    DeviceError,
    MissingDependencyError,
    SessionError,
)
from hhdeploy.runtime import backends, open_session
from hhdeploy.runtime import onnxruntime_backend as onnxruntime
from hhdeploy.runtime.backends import Target, find_target
from tests.onnxruntime_double import stand_in
from tests.runtime.gpu_double import add_engine
from tests.support import images
from tests.workshop import copy_bundle

PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


# --- what this build of ONNX Runtime lacks ------------------------------------------------------


@pytest.mark.parametrize("device", PROVIDERS)
def test_a_provider_that_this_build_lacks(small, device):
    if PROVIDERS[device] in ort.get_available_providers():
        pytest.skip(f"this build has {PROVIDERS[device]}")
    there = ", ".join(ort.get_available_providers())
    with pytest.raises(SessionError, match=f"`device='{device}'` needs .*{PROVIDERS[device]}, "):
        open_session(small, device=device)
    with pytest.raises(SessionError, match=f"this build has {there}"):
        open_session(small, device=device)


@pytest.mark.parametrize("device", PROVIDERS)
def test_a_provider_that_does_not_start_is_an_error(small, monkeypatch, device):
    class Dropped:
        def __init__(self, graph, settings, providers, enable_fallback):
            assert providers[0][0] == PROVIDERS[device]
            assert not enable_fallback

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDERS[device]])
    monkeypatch.setattr(ort, "InferenceSession", Dropped)
    with pytest.raises(SessionError, match="would have used CPUExecutionProvider"):
        open_session(small, device=device)


needs_azure = pytest.mark.skipif(
    "AzureExecutionProvider" not in ort.get_available_providers(),
    reason="a provider that takes no nodes is needed; this build has no AzureExecutionProvider",
)


@needs_azure
@pytest.mark.parametrize("device", ["ort-tensorrt", "ort-tensorrt-rtx"])
def test_a_graph_that_tensorrt_leaves_to_the_cpu_is_an_error(small, monkeypatch, device):
    """ONNX Runtime itself refuses: the Azure provider takes no node of this graph."""
    stand_in(monkeypatch, device, "AzureExecutionProvider")
    with pytest.raises(DeviceError, match="fallback to CPU EP has been explicitly disabled"):
        open_session(small, device=device)


@needs_azure
def test_products_that_cuda_leaves_to_the_cpu_are_an_error(small, monkeypatch):
    stand_in(monkeypatch, "cuda", "AzureExecutionProvider")
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this version of ONNX Runtime does not tell what runs where")
    with pytest.raises(DeviceError, match=r"leaves \d+ of the graph's products .*MatMul"):
        open_session(small, device="cuda")


class Assigned:
    """A session that tells where its nodes went, as ONNX Runtime does."""

    class Part:
        def __init__(self, provider, kinds):
            self.ep_name, self.kinds = provider, kinds

        def get_nodes(self):
            return [SimpleNamespace(op_type=kind) for kind in self.kinds]

    def __init__(self, **kinds):
        self.parts = [
            self.Part(f"{name}ExecutionProvider", found.split()) for name, found in kinds.items()
        ]

    def get_provider_graph_assignment_info(self):
        return self.parts


def test_the_name_says_what_is_left_to_the_cpu():
    placed, provider = onnxruntime._placed, PROVIDERS["cuda"]
    assert placed(Assigned(CUDA="MatMul Add Shape"), provider, "1.31") == ""
    left = Assigned(CUDA="MatMul Add Add", CPU="Shape Gather Shape")
    assert placed(left, provider, "1.31") == " (3 of 6 nodes on the CPU: Gather, Shape)"
    with pytest.raises(DeviceError, match=r"leaves 2 of .* to the CPU \(FusedMatMul, Gemm\)"):
        placed(Assigned(CUDA="Add", CPU="Shape Gemm FusedMatMul"), provider, "1.31")
    # Older versions: what is not known is not claimed.
    assert "1.22 does not tell" in placed(object(), provider, "1.22")


def test_a_graph_that_a_gpu_cannot_load(small, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(DeviceError, match=r"model\.onnx with CUDA.*: no kernel image"):
        open_session(small, device="cuda")


# --- auto ---------------------------------------------------------------------------------------


def test_what_runs_graphs_needs_no_engine(small):
    for device in ("cpu", "cuda", "openvino", "ort-tensorrt", "ort-tensorrt-rtx"):
        assert find_target(Bundle.open(small).manifest, device, "float32") == Target(device)


@pytest.fixture
def two_engines(small, tmp_path):
    path = copy_bundle(small, tmp_path / "two")
    plan = str(path / "model.onnx").encode()
    add_engine(path, plan, backend="tensorrt-rtx")
    add_engine(path, plan, backend="tensorrt")
    return path


def auto(path, precision="float32"):
    target = find_target(Bundle.open(path).manifest, "auto", precision)
    assert (target.engine is None) == (target.device not in ("tensorrt", "tensorrt-rtx"))
    return target.device


def test_auto_takes_an_engine_that_fits(two_engines, small, machine, monkeypatch):
    assert auto(two_engines) == "tensorrt"
    monkeypatch.setattr(machine["tensorrt"], "__version__", "99.2")
    assert auto(two_engines) == "tensorrt-rtx"
    monkeypatch.setattr(machine["tensorrt-rtx"], "__version__", "99.2")
    assert auto(two_engines) == auto(small)
    with open_session(two_engines, threads=1) as session:
        assert "CPU" in session.device


def test_auto_never_takes_another_precision(two_engines, machine):
    assert auto(two_engines, "float16") not in ("tensorrt", "tensorrt-rtx")
    with pytest.raises(BundleError, match="no float16 graph"):
        open_session(two_engines, precision="float16")


@pytest.mark.parametrize("error", [DeviceError, MissingDependencyError])
def test_auto_without_a_gpu_or_without_tensorrt(two_engines, machine, monkeypatch, error):
    from hhdeploy.runtime import cuda

    def nothing():
        raise error("nothing here")

    monkeypatch.setattr(cuda, "find_gpu", nothing)
    assert auto(two_engines) == backends._fastest_cpu("float32")


def test_auto_does_not_hide_an_engine_that_is_damaged(two_engines, machine):
    (two_engines / "model.float32.tensorrt.engine").write_bytes(b"changed")
    with pytest.raises(BundleError, match="expected sha256"):
        open_session(two_engines)


def test_auto_prefers_onnx_runtime_on_a_gpu_to_the_cpu(small, monkeypatch):
    monkeypatch.setattr(onnxruntime, "cuda_available", lambda: True)
    assert auto(small) == "cuda"
    monkeypatch.setattr(onnxruntime, "cuda_available", lambda: False)
    assert auto(small) == backends._fastest_cpu("float32")


@pytest.mark.parametrize("precision", ["float32", "int8", "float16"])
def test_auto_on_a_cpu_prefers_openvino(small, monkeypatch, precision):
    pytest.importorskip("openvino")
    monkeypatch.setattr(onnxruntime, "cuda_available", lambda: False)
    # Of INT8 on processors without VNNI see test_processor.py.
    monkeypatch.setattr(backends, "overflows_in_int8", lambda: False)
    assert auto(small, precision) == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert auto(small, precision) == "cpu"


def test_auto_leaves_bfloat16_to_openvino_alone(small, monkeypatch):
    """ONNX Runtime has none on a CPU: an error that names the extra, not another precision."""
    monkeypatch.setattr(onnxruntime, "cuda_available", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert auto(small, "bfloat16") == "openvino"
    with pytest.raises(MissingDependencyError, match=r"hhdeploy\[openvino\]"):
        open_session(small, precision="bfloat16")


def test_bfloat16_on_onnx_runtime_s_cpu_is_refused_in_words(small):
    with pytest.raises(SessionError, match=r"bfloat16.* expected `device='openvino'` or a GPU"):
        open_session(small, device="cpu", precision="bfloat16")


def test_the_session_says_what_auto_took(small, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(onnxruntime, "cuda_available", lambda: False)
    with open_session(small, cache=None) as session:
        assert session.device == "openvino CPU"
    monkeypatch.setitem(sys.modules, "openvino", None)
    with open_session(small, cache=None) as session:
        assert session.device == "onnxruntime CPUExecutionProvider"


@pytest.mark.parametrize(("platform", "name"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_cuda_needs_the_provider_and_the_driver(monkeypatch, platform, name):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    loads = []
    monkeypatch.setattr(onnxruntime.ctypes, "CDLL", loads.append)
    assert onnxruntime.cuda_available()
    assert loads == [name]

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(onnxruntime.ctypes, "CDLL", missing)
    assert not onnxruntime.cuda_available()
    monkeypatch.setattr(onnxruntime.ctypes, "CDLL", loads.append)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert not onnxruntime.cuda_available()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not onnxruntime.cuda_available()


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", "cpu", "openvino", "ort-tensorrt"])
def test_cuda_graphs_are_refused_where_there_are_none(small, device):
    with pytest.raises(SessionError, match=r"`cuda_graphs`: .*expected one of cuda, tensorrt"):
        open_session(small, device=device, cuda_graphs=True)


def test_contexts_change_nothing_on_a_cpu(small, own):
    x = images(3)
    with open_session(small, device="cpu", threads=1, contexts=3) as session:
        assert np.array_equal(session.run(x, "alpha"), own.run(x, "alpha"))


@pytest.mark.parametrize(
    ("slots", "given", "room"),
    [
        ((2, 8, 16), None, 16),
        ((2, 8, 100), None, 64),
        ((80, 90, 100), None, 80),
        ((2, 8, 16), 5, 5),
    ],
)
def test_the_bank_has_the_size_that_an_engine_takes(
    small,
    tmp_path,
    machine,
    slots,
    given,
    room,
):
    path = copy_bundle(small, tmp_path / "b")
    add_engine(path, str(path / "model.onnx").encode(), slots=slots)
    with open_session(path, device="tensorrt", slots=given) as session:
        assert session.adapters.slots == room
