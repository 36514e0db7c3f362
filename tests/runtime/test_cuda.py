"""CUDA without a GPU: errors for every status, names and signatures, lifetimes on a stand-in."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import numpy as np
import pytest

from hhdeploy.errors import DeviceError, MissingDependencyError
from hhdeploy.runtime import cuda
from tests.runtime.bindings import problems, source, uses
from tests.runtime.gpu_double import Cudart


@pytest.fixture(scope="module")
def cudart():
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")


@pytest.fixture
def double(monkeypatch):
    stand_in = Cudart()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", stand_in)
    return stand_in


# --- the installed bindings ---------------------------------------------------------------------


def owners(cudart):
    own = dict.fromkeys(("cudart", "self._cudart", "_cudart()"), cudart)
    for name in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
        own |= {f"cudart.{name}": getattr(cudart, name)}
        own |= {f"self._cudart.{name}": getattr(cudart, name)}
    return {**own, "properties": cudart.cudaDeviceProp}


def test_every_name_and_signature_is_the_installed_bindings(cudart):
    found, known = uses(source("cuda")), owners(cudart)
    assert problems(found, known) == []
    # Nothing of CUDA is used in a way that this test does not see.
    assert {u.owner for u in found if u.name.startswith("cuda")} <= set(known)
    assert len([u for u in found if u.owner in known]) > 20


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        ("cudaGraphLaunch(graph,", "cudaGraphLounch(graph,", "cudaGraphLounch does not exist"),
        ("cudaMalloc(size)", "cudaMalloc(size, 0)", r"cudaMalloc takes \[\(1, 1\)\], not 2"),
        ("cudaMemcpyHostToDevice", "cudaMemcpyHostToGpu", "cudaMemcpyHostToGpu does not exist"),
        ("properties.major", "properties.mayor", "mayor does not exist"),
    ],
)
def test_a_slip_would_be_noticed(cudart, right, wrong, found):
    text = source("cuda")
    assert right in text
    with pytest.raises(AssertionError, match=found):
        assert not problems(uses(text.replace(right, wrong)), owners(cudart))


def test_the_stand_in_has_no_function_that_cuda_lacks(cudart):
    for name in vars(Cudart):
        if name.startswith("cuda"):
            assert hasattr(cudart, name)


def test_every_status_but_success_is_an_error_with_a_text(cudart):
    statuses = list(cudart.cudaError_t)
    assert len(statuses) > 100
    for status in statuses:
        if status == cudart.cudaError_t.cudaSuccess:
            assert cuda.result_of((status,)) is None
            assert cuda.result_of((status, 7)) == 7
            continue
        with pytest.raises(DeviceError) as caught:
            cuda.result_of((status, None))
        text = str(caught.value)
        assert f"({status.name}, {int(status)})" in text
        assert len(text.partition(" (")[0]) > len("CUDA: ")
        assert text.endswith((".", "hhdeploy doctor"))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cudaErrorNoDevice", "CUDA_VISIBLE_DEVICES"),
        ("cudaErrorInsufficientDriver", "install or update"),
        ("cudaErrorMemoryAllocation", "fewer `slots` or `contexts`"),
        ("cudaErrorIllegalAddress", "restart it"),
        ("cudaErrorLaunchFailure", "restart it"),
        ("cudaErrorStreamCaptureUnsupported", "without `cuda_graphs`"),
        ("cudaErrorInvalidValue", "hhdeploy doctor"),
    ],
)
def test_common_statuses_say_what_to_do(cudart, name, advice):
    with pytest.raises(DeviceError, match=advice):
        cuda.result_of((getattr(cudart.cudaError_t, name),))


def test_every_hint_is_for_a_status_that_exists(cudart):
    assert set(cuda._HINTS) <= set(cudart.cudaError_t.__members__)


def test_a_machine_without_a_gpu_says_so(cudart):
    if cudart.cudaGetDeviceCount()[0] == cudart.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    calls = [
        cuda.find_gpu,
        cuda.use_gpu,
        cuda.open_stream().__enter__,
        cuda.device_memory(64).__enter__,
        cuda.pinned_array((2,), np.float32).__enter__,
    ]
    for call in calls:
        with pytest.raises(DeviceError, match="nvidia-smi"):
            call()


def test_without_cuda_bindings_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hhdeploy\[rtx\]'"):
        cuda.find_gpu()


# --- lifetimes, on a stand-in -------------------------------------------------------------------


def test_the_gpu_is_named_as_engines_name_it(double):
    assert cuda.find_gpu() == cuda.Gpu("Stand-in GPU", "sm89")


def test_a_round_trip(double):
    values = np.arange(35, dtype=np.float32).reshape(5, 7)
    with (
        cuda.open_stream() as stream,
        cuda.device_memory(values.nbytes) as address,
        cuda.pinned_array((5, 7), np.float32) as back,
    ):
        assert not back.any()
        stream.upload(address, values)
        stream.download(back, address)
        stream.synchronize()
        assert np.array_equal(back, values)
        stream.download(back[:2], address + 3 * 7 * 4)
        stream.synchronize()
        assert np.array_equal(back, values[[3, 4, 2, 3, 4]])
    assert double.clean


def test_a_graph_is_recorded_without_running_and_replayed(double):
    ran = []
    with cuda.open_stream() as stream, ExitStack() as stack:
        work = stream.captured(lambda: double.do(stream.handle, lambda: ran.append(1)))
        graph = stack.enter_context(work)
        assert not ran
        stream.replay(graph)
        stream.replay(graph)
        assert not ran
        stream.synchronize()
        assert len(ran) == 2
    assert double.clean


def test_work_that_fails_while_recorded_leaves_the_stream_usable(double):
    def fail():
        raise DeviceError("no")

    with cuda.open_stream() as stream:
        with pytest.raises(DeviceError, match="no"), stream.captured(fail):
            pass
        stream.synchronize()
    assert double.clean


def test_everything_is_freed_when_something_fails(double):
    def open_all():
        with ExitStack() as stack:
            stack.enter_context(cuda.open_stream())
            stack.enter_context(cuda.pinned_array((5,), np.int64))
            stack.enter_context(cuda.device_memory(100))
            stack.enter_context(cuda.device_memory(101))

    double.left = 100
    with pytest.raises(DeviceError, match="fewer `slots`"):
        open_all()
    assert double.clean
