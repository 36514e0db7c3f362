"""ONNX Runtime on a GPU as far as the CPU shows it: memory of the CPU in the place of a GPU's."""

from __future__ import annotations

import subprocess
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest

from hhdeploy.errors import DeviceError, SessionError
from hhdeploy.runtime import onnxruntime_gpu, open_session
from tests.onnxruntime_double import stand_in
from tests.support import assert_caught, assert_parity, images
from tests.workshop import run_python

# --- the bank on the device: the same calls with memory of the CPU ------------------------------


@pytest.fixture
def bound(small, monkeypatch):
    """A session that binds its bank as on a GPU."""
    stand_in(monkeypatch, "ort-tensorrt", "CPUExecutionProvider")
    monkeypatch.setattr(ort.SessionOptions, "add_session_config_entry", lambda *given: None)
    with open_session(small, device="ort-tensorrt", threads=1, slots=4) as session:
        assert isinstance(session._backend, onnxruntime_gpu.OnnxRuntimeGpuBackend)
        yield session


def test_a_bound_bank_gives_the_same_logits(bound, own):
    names, x = ["alpha", "gamma", "gamma", "alpha", "gamma"], images(5)
    assert_parity(own.run(x, names), bound.run(x, names), "branches", "float32")
    assert_caught(own.run(x, "gamma")[:, :3], bound.run(x, "alpha")[:, :3], "branches", "float32")


def test_a_bound_bank_is_a_copy_that_follows_every_change(bound, own, workshop):
    x = images(3)
    alpha = bound.run(x, "alpha")
    bound.adapters.rows[1] = 0  # the copy is not told: what a forgotten row_changed would do
    assert np.array_equal(bound.run(x, "alpha"), alpha)
    for session in (bound, own):
        session.adapters.add("rival", workshop.directory("rival"))
    assert_parity(own.run(x, "rival"), bound.run(x, "rival"), "branches", "float32")
    bound.adapters.remove("gamma")
    assert not bound._backend._bound.numpy()[2].any()
    assert bound._backend._bound.numpy()[3].any()


def test_a_folded_graph_needs_no_bank(folded, workshop, monkeypatch):
    stand_in(monkeypatch, "ort-tensorrt", "CPUExecutionProvider")
    monkeypatch.setattr(ort.SessionOptions, "add_session_config_entry", lambda *given: None)
    x = images(3)
    with open_session(folded, device="ort-tensorrt", threads=1) as session:
        assert_parity(workshop.truth("alpha", x), session.run(x), "branches", "float32")


def test_a_run_that_the_gpu_refuses(bound):
    with pytest.raises(DeviceError, match=r"CPUExecutionProvider failed: .*adapter_ids"):
        bound._backend.run(images(2), None)


def test_a_bound_session_that_is_closed_says_so(bound):
    run = bound.unchecked()
    bound.close()
    with pytest.raises(SessionError, match="the session is closed"):
        run(images(2), np.zeros(2, np.int64))


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this build has CUDA"
)
def test_a_bank_that_the_gpu_does_not_take(small, monkeypatch):
    stand_in(monkeypatch, "ort-tensorrt", "CPUExecutionProvider")
    monkeypatch.setattr(onnxruntime_gpu, "MEMORY", "cuda")
    monkeypatch.setattr(ort.SessionOptions, "add_session_config_entry", lambda *given: None)
    with pytest.raises(DeviceError, match=r"MB on the GPU: .* fewer `slots`"):
        open_session(small, device="ort-tensorrt")


# --- CUDA graphs --------------------------------------------------------------------------------


@pytest.fixture
def recorded(small, monkeypatch):
    """A session that records its runs, as far as the CPU can: all but the recording."""
    stand_in(monkeypatch, "cuda", "CPUExecutionProvider")
    with open_session(small, device="cuda", threads=1, slots=4, cuda_graphs=True) as session:
        assert isinstance(session._backend, onnxruntime_gpu.OnnxRuntimeGraphBackend)
        yield session


def test_the_provider_is_asked_to_record(small, monkeypatch):
    asked = []

    class Refusing:
        def __init__(self, graph, settings, providers, enable_fallback):
            asked.extend(providers)
            raise RuntimeError("no GPU here")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Refusing)
    for graphs in (True, False):
        with pytest.raises(DeviceError, match="no GPU here"):
            open_session(small, device="cuda", cuda_graphs=graphs)
    options = {"use_tf32": "0"}
    assert asked == [
        ("CUDAExecutionProvider", {**options, "enable_cuda_graph": "1"}),
        ("CUDAExecutionProvider", options),
    ]


def test_recorded_runs_say_what_others_say(recorded, own):
    names = ["alpha", "gamma", "gamma", "alpha", "gamma"]
    for count in (5, 2, 5, 1, 2):
        x = images(count, seed=count)
        expected = own.run(x, names[:count])
        assert_parity(expected, recorded.run(x, names[:count]), "branches", "float32")
    x = images(5)
    assert_caught(
        own.run(x, "gamma")[:, :3], recorded.run(x, "alpha")[:, :3], "branches", "float32"
    )


def test_an_answer_is_not_overwritten_by_the_next(recorded):
    first = recorded.run(images(2, seed=1), "alpha")
    kept = first.copy()
    assert not np.array_equal(recorded.run(images(2, seed=2), "alpha"), kept)
    assert np.array_equal(first, kept)


def test_what_was_given_is_not_written_into(recorded):
    x = images(2, seed=1)
    before = x.copy()
    for seed in (1, 2):
        recorded.run(x if seed == 1 else images(2, seed=seed), "alpha")
    assert np.array_equal(x, before)


def test_each_size_has_memory_and_a_number_of_its_own(recorded, monkeypatch):
    numbers = []

    class Noted(ort.RunOptions):
        def add_run_config_entry(self, key, value):
            numbers.append((key, value))
            super().add_run_config_entry(key, value)

    monkeypatch.setattr(ort, "RunOptions", Noted)
    for count in (3, 2, 3, 2):
        recorded.run(images(count), "alpha")
    assert numbers == [("gpu_graph_id", "3"), ("gpu_graph_id", "2")]
    sizes = recorded._backend._sizes
    addresses = {size: sizes[size]._logits.data_ptr() for size in sizes}
    assert set(addresses) == {2, 3} and addresses[2] != addresses[3]
    recorded.run(images(3), "alpha")
    assert sizes[3]._logits.data_ptr() == addresses[3]


def test_recorded_runs_follow_every_change_of_the_bank(recorded, own, workshop):
    x = images(3)
    alpha = recorded.run(x, "alpha")
    recorded.adapters.rows[1] = 0
    assert np.array_equal(recorded.run(x, "alpha"), alpha)  # a copy, which was not told
    for session in (recorded, own):
        session.adapters.add("rival", workshop.directory("rival"))
    assert_parity(own.run(x, "rival"), recorded.run(x, "rival"), "branches", "float32")
    recorded.adapters.remove("gamma")
    assert not recorded._backend._bound.numpy()[2].any()


def test_one_thread_does_all_the_work_of_a_session(recorded, workshop, monkeypatch):
    threads = []
    run, copy = onnxruntime_gpu._Recorded.run, onnxruntime_gpu._copy_bank

    def noted_run(self, feeds):
        threads.append(threading.get_ident())
        return run(self, feeds)

    def noted_copy(*given):
        threads.append(threading.get_ident())
        return copy(*given)

    monkeypatch.setattr(onnxruntime_gpu._Recorded, "run", noted_run)
    monkeypatch.setattr(onnxruntime_gpu, "_copy_bank", noted_copy)
    x = images(2)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: recorded.run(x, "alpha"), range(12)))
        recorded.adapters.add("rival", workshop.directory("rival"))
    assert all(np.array_equal(found[0], other) for other in found)
    assert len(threads) == 13 and len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_a_folded_graph_is_recorded_too(folded, workshop, monkeypatch):
    stand_in(monkeypatch, "cuda", "CPUExecutionProvider")
    with open_session(folded, device="cuda", threads=1, cuda_graphs=True) as session:
        for seed in (1, 2):
            x = images(3, seed=seed)
            assert_parity(workshop.truth("alpha", x), session.run(x), "branches", "float32")


def test_a_size_that_cannot_be_recorded_is_not_kept(recorded, monkeypatch):
    def refuse(self, feeds):
        raise RuntimeError("capture failed")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime_gpu._Recorded, "run", refuse)
        with pytest.raises(DeviceError, match=r"CUDA graphs: capture failed\. .*without `cuda_gr"):
            recorded.run(images(2), "alpha")
    assert not recorded._backend._sizes
    assert recorded.run(images(2), "alpha").shape[0] == 2


def test_a_recording_session_is_closed_with_its_thread(small, monkeypatch):
    stand_in(monkeypatch, "cuda", "CPUExecutionProvider")
    session = open_session(small, device="cuda", threads=1, cuda_graphs=True)
    session.run(images(1), "alpha")
    backend = session._backend
    session.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("hhdeploy-cuda-graphs")]
    backend.row_changed(1)  # of a bank that is gone
    with pytest.raises(SessionError, match="the session is closed"):
        backend.run(images(1), None)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this build has CUDA"
)
def test_a_bank_that_does_not_fit_leaves_no_thread(small, monkeypatch):
    stand_in(monkeypatch, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(onnxruntime_gpu, "MEMORY", "cuda")
    with pytest.raises(DeviceError, match=r"MB on the GPU: .* fewer `slots`"):
        open_session(small, device="cuda", cuda_graphs=True)
    assert not [t for t in threading.enumerate() if t.name.startswith("hhdeploy-cuda-graphs")]


# --- CUDA's libraries ---------------------------------------------------------------------------

_PRELOAD = """
    import ctypes, sys
    from hhdeploy.runtime import onnxruntime_gpu

    if sys.argv[1] == "torch":
        sys.modules["torch"] = object()
    loaded = []
    ctypes.CDLL = loaded.append

    class Ort:
        cuda_version = "" if sys.argv[1] == "no CUDA" else "13.0"

        def preload_dlls():
            print("cannot find libnone")
            loaded.append("onnxruntime's own")

    onnxruntime_gpu.preload_libraries(Ort)
    print(*loaded, sep="\\n")
"""


def preload(site, *arguments: object) -> subprocess.CompletedProcess[str]:
    begin = f"import sys; sys.path[:0] = [{str(site)!r}]\n"
    return run_python(begin + textwrap.dedent(_PRELOAD), *arguments)


@pytest.fixture
def site(tmp_path):
    """CUDA's packages as pip lays them out, in a directory that ONNX Runtime is not in."""
    for name in ("cu13/lib/libcublas.so.13", "cu13/lib/libcudart.so.13", "cudnn/lib/libcudnn.so.9",
                 "cudnn/lib/libcudnn_ops.so.9", "cu13/lib/libcublasLt.so.13"):  # fmt: skip
        file = tmp_path / "nvidia" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path


def test_libraries_are_found_in_any_directory_of_the_path(site):
    ran = preload(site, "alone")
    assert ran.returncode == 0, ran.stderr
    found = [line for line in ran.stdout.splitlines() if str(site) in line or "own" in line]
    names = [line.rpartition("/")[2] for line in found]
    # Each after what it is linked with; parts of cuDNN are its own affair; then ONNX Runtime.
    assert names == ["libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcudnn.so.9",
                     "onnxruntime's own"]  # fmt: skip


def test_what_onnx_runtime_says_does_not_go_to_stdout(site):
    ran = preload(site, "alone")
    assert "cannot find libnone" in ran.stderr and "cannot find" not in ran.stdout


@pytest.mark.parametrize("why", ["torch", "no CUDA"])
def test_libraries_that_torch_has_loaded_or_nobody_needs_are_left_alone(site, why):
    ran = preload(site, why)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[0] == "onnxruntime's own"
