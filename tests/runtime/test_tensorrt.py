"""TensorRT sessions without a GPU: what is refused, and the plumbing on stand-ins.

Results of a GPU are tested in tests/gpu alone. Here "engines" are the bundle's own ONNX graphs,
computed by ONNX Runtime behind stand-ins of CUDA and TensorRT, so that logits show whether the
right images, ids and rows reached the right place.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import write_manifest
from hhdeploy.errors import (
    BundleError,
    DeviceError,
    MissingDependencyError,
    PlanError,
    SessionError,
)
from hhdeploy.files.caches import CacheWarning
from hhdeploy.runtime import cuda, kernel_cache, open_session
from hhdeploy.runtime.tensorrt_backend import check_tensors, expected_tensors
from hhdeploy.runtime.tensorrt_engine import EngineTensor, open_engine
from hhdeploy.runtime.tensorrt_lane import fill
from tests.docs.pages import blocks
from tests.runtime.bindings import Use, problems, source, uses
from tests.runtime.gpu_double import BATCH, SLOTS, add_engine
from tests.support import assert_caught, assert_parity, images
from tests.workshop import copy_bundle, flip_byte

NAMES = ["alpha", "gamma", "gamma", "alpha", "gamma", "alpha", "alpha"]


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


@pytest.fixture
def built(small, tmp_path, machine):
    """Alpha and gamma with an engine for either backend."""
    path = copy_bundle(small, tmp_path / "built")
    for backend in ("tensorrt", "tensorrt-rtx"):
        add_engine(path, str(path / "model.onnx").encode(), backend=backend)
    return path


both = pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])


# --- the installed bindings ---------------------------------------------------------------------


def known_owners(rtx):
    """How the sources call TensorRT's objects."""
    engine = {
        "trt": rtx,
        "self._trt": rtx,
        "trt.TensorIOMode": rtx.TensorIOMode,
        "self._trt.CudaGraphStrategy": rtx.CudaGraphStrategy,
        "self._trt.ExecutionContextAllocationStrategy": rtx.ExecutionContextAllocationStrategy,
        "self._runtime": rtx.Runtime,
        "engine": rtx.ICudaEngine,
        "self._engine": rtx.ICudaEngine,
        "engine.get_tensor_dtype(name)": rtx.DataType,
        "config": rtx.IRuntimeConfig,
        "kernels": rtx.IRuntimeCache,
        "context": rtx.IExecutionContext,
    }
    return {"tensorrt_engine": engine, "tensorrt_lane": {"context": rtx.IExecutionContext}}


def test_every_name_and_signature_is_the_installed_bindings(rtx):
    classes = (
        rtx.Runtime,
        rtx.ICudaEngine,
        rtx.IExecutionContext,
        rtx.IRuntimeConfig,
        rtx.IRuntimeCache,
    )
    methods = {
        name for c in classes for name in dir(c) if callable(getattr(c, name)) and name[0] != "_"
    }
    for module, owners in known_owners(rtx).items():
        found = uses(source(module))
        assert problems(found, owners) == []
        assert {u.owner for u in found} >= set(owners)
        # No method of TensorRT is called on something that this test does not know.
        calls = {u for u in found if u.arguments is not None and u.name in methods}
        assert {u.owner for u in calls} <= set(owners), calls
    for module in ("tensorrt_backend", "kernel_cache", "backends"):
        assert not {u for u in uses(source(module)) if u.owner == "trt"}


@pytest.mark.parametrize(
    ("module", "right", "wrong", "found"),
    [
        ("tensorrt_lane", "execute_async_v3(", "execute_async_v4(", "v4 does not exist"),
        ("tensorrt_lane", "set_input_shape(name, shape)", "set_input_shape(name)", "not 1"),
        ("tensorrt_engine", "Runtime(self._logger)", "Runtime()", "not 0"),
        ("tensorrt_engine", "_async(0, stream.handle)", "_async(0)", "not 1"),
        ("tensorrt_engine", "config.cuda_graph_strategy", "config.graphs", "does not exist"),
        ("tensorrt_engine", "USER_MANAGED", "USER", "USER does not exist"),
    ],
)
def test_a_slip_would_be_noticed(rtx, module, right, wrong, found):
    text = source(module)
    assert right in text
    wrongs = problems(uses(text.replace(right, wrong)), known_owners(rtx)[module])
    assert any(found in problem for problem in wrongs), wrongs


def test_a_property_that_cannot_be_assigned_would_be_noticed(rtx):
    use = Use("engine", "num_io_tensors", None, stored=True)
    assert problems({use}, {"engine": rtx.ICudaEngine})


def test_an_engine_that_tensorrt_cannot_read(rtx, small, tmp_path):
    """The real TensorRT-RTX, which needs no GPU to refuse a file."""
    entry = add_engine(copy_bundle(small, tmp_path / "b"), b"none", backend="tensorrt-rtx")
    engine = open_engine(b"none", entry, None, cuda_graphs=False)
    with pytest.raises(BundleError, match=r"tensorrt-rtx 99\.1 cannot load .*engine: .*rror"):
        engine.__enter__()


# --- this machine -------------------------------------------------------------------------------


def test_without_a_gpu_tensorrt_rtx_says_so(rtx, small):
    try:
        gpu = cuda.find_gpu()
    except DeviceError:
        with pytest.raises(DeviceError, match="nvidia-smi"):
            open_session(small, device="tensorrt-rtx")
    else:
        pytest.skip(f"this machine has {gpu.name}")


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [("tensorrt", "tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx", "rtx")],
)
def test_a_backend_that_is_not_installed(small, monkeypatch, backend, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'hhdeploy\[{extra}\]'"):
        open_session(small, device=backend)


# --- refused before anything is deserialised ----------------------------------------------------


def refuses(machine, path, message, error=BundleError, **options):
    with pytest.raises(error, match=message):
        open_session(path, device="tensorrt", **options)
    assert not machine["tensorrt"].engines
    assert machine["cudart"].clean


def test_no_engine(small, machine):
    refuses(machine, small, "no float32 engine for tensorrt; it has: none")


def test_an_engine_of_another_version_gpu_or_graph(built, machine, monkeypatch):
    monkeypatch.setattr(machine["tensorrt"], "__version__", "99.2")
    refuses(machine, built, r"built with tensorrt 99\.1, installed is 99\.2")
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ("sm86",)}, "built for sm86, this GPU is sm89"),
        ({"graph_sha256": "0" * 64}, "another graph"),
        ({"bank_sha256": "0" * 64}, "the bank baked into it"),
        ({"precision": "float16"}, "it has: tensorrt float16"),
    ],
)
def test_an_engine_that_is_not_for_here(small, tmp_path, machine, change, message):
    path = copy_bundle(small, tmp_path / "b")
    add_engine(path, b"plan", **change)
    refuses(machine, path, message)


def test_an_engine_file_that_was_changed(built, machine):
    flip_byte(built / "model.float32.tensorrt.engine", 3)
    refuses(machine, built, "expected sha256")


def test_an_engine_file_that_is_gone(built, machine):
    (built / "model.float32.tensorrt.engine").unlink()
    refuses(machine, built, "is missing")


@pytest.mark.parametrize("slots", [17, 1000])
def test_more_slots_than_the_engine_takes(built, machine, slots):
    refuses(machine, built, f"`slots={slots}`: .*`max_slots={slots}`", SessionError, slots=slots)


@pytest.mark.parametrize("contexts", [0, -1, 100_000])
def test_contexts_that_no_machine_has(built, machine, contexts):
    refuses(machine, built, "`contexts`: expected 1 to 1024", SessionError, contexts=contexts)


# --- the engine's tensors -----------------------------------------------------------------------


def contract(path):
    bundle = Bundle.open(path)
    return bundle.manifest, bundle.manifest.engines[0]


def test_the_contract_s_tensors(built, folded, tmp_path):
    manifest, entry = contract(built)
    tensors = expected_tensors(manifest, entry)
    assert [str(t) for t in tensors] == [
        "input images FLOAT [-1, 3, 32, 32]",
        "input adapter_ids INT64 [-1]",
        f"input adapter_bank FLOAT [-1, {manifest.layout.size}]",
        "output logits FLOAT [-1, 7]",
    ]
    check_tensors(list(reversed(tensors)), manifest, entry)
    fixed = [replace(t, shape=(5, *t.shape[1:])) for t in tensors]
    check_tensors(fixed, manifest, entry)
    assert len(expected_tensors(manifest, replace(entry, slots=None))) == 3
    plain = copy_bundle(folded, tmp_path / "f")
    add_engine(plain, b"plan")
    assert [t.name for t in expected_tensors(*contract(plain))] == ["images", "logits"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("images", {"dtype": "HALF"}),
        ("images", {"shape": (-1, 3, 32, 31)}),
        ("images", {"shape": (-1, 3, 32)}),
        ("images", {"name": "pixels"}),
        ("adapter_ids", {"dtype": "INT32"}),
        ("adapter_bank", {"shape": (-1, 8)}),
        ("logits", {"is_input": True}),
        ("logits", {"shape": (-1, -1)}),
        ("logits", None),
    ],
)
def test_an_engine_with_other_tensors(built, name, change):
    manifest, entry = contract(built)
    found = [
        replace(t, **change) if t.name == name and change else t
        for t in expected_tensors(manifest, entry)
        if change or t.name != name
    ]
    with pytest.raises(BundleError, match=r"(?s)Expected: input images.*Found: .*build\("):
        check_tensors(found, manifest, entry)
    extra = EngineTensor("mask", True, "FLOAT", (-1,))
    with pytest.raises(BundleError, match="input mask FLOAT"):
        check_tensors([*expected_tensors(manifest, entry), extra], manifest, entry)


@both
def test_an_engine_of_another_type_is_refused_when_opened(built, machine, backend):
    machine[backend].dtypes["images"] = "HALF"
    with pytest.raises(BundleError, match=r"Found: input images HALF \[-1, 3, 32, 32\]"):
        open_session(built, device=backend)
    assert machine["cudart"].clean


def test_padding_is_zeros_and_leaves_the_rest_alone():
    staged = np.full((7, 2), 9.0)
    fill(staged, np.array([[1.0, 2.0], [3.0, 4.0]]), 5)
    assert staged.tolist() == [[1, 2], [3, 4], *[[0, 0]] * 3, *[[9, 9]] * 2]
    fill(staged, np.ones((7, 2)), 7)
    assert staged.tolist() == [[1, 1]] * 7


# --- plumbing, on stand-ins ---------------------------------------------------------------------


@pytest.fixture
def truth(small):
    with open_session(small, device="cpu", threads=1) as session:
        yield session


@both
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 13])
def test_every_batch_size_gives_the_logits_of_its_images(built, machine, truth, backend, count):
    x, names = images(count, seed=count), (NAMES * 2)[:count]
    with open_session(built, device=backend) as session:
        assert session.device == f"{backend} 99.1 Stand-in GPU"
        found = session.run(x, names)
        assert found.dtype == np.float32
        assert_parity(truth.run(x, names), found, "branches", "float32")
        swapped = ["gamma" if name == "alpha" else "alpha" for name in names]
        own = slice(0, 3)  # gamma's classes
        assert_caught(truth.run(x, swapped)[:, own], found[:, own], "branches", "float32")
        sizes = machine[backend].engines[0].batches
    assert all(BATCH[0] <= size <= BATCH[2] for size in sizes)
    assert machine["cudart"].clean


def test_the_page_s_session(built, machine, workshop):
    """docs/tensorrt.md's code as it stands, but for names and what the engine here is of."""
    (code,) = (block.text for block in blocks("docs/tensorrt.md") if block.kind == "python")
    names = {
        "OUT": built,
        "digits": "alpha",
        "faces": "gamma",
        "adapters/cars": workshop.directory("gamma"),
        "None": '"gamma"',  # the bundle has no classifier of the bare backbone
        "float16": "float32",
        "=64": "=8",
    }
    for theirs, ours in names.items():
        code = code.replace(theirs, str(ours))
    scope = {"x": images(3)}
    exec(compile(code, "docs/tensorrt.md", "exec"), scope)
    with open_session(built, device="cpu", threads=1) as session:
        expected = session.run(scope["x"], ["alpha", "gamma", "gamma"])
    assert_parity(expected, scope["logits"], "branches", "float32")


@both
def test_a_folded_bundle(folded, tmp_path, machine, backend):
    path = copy_bundle(folded, tmp_path / "f")
    add_engine(path, str(path / "model.onnx").encode(), backend=backend)
    x = images(7)
    with (
        open_session(path, device=backend) as session,
        open_session(folded, device="cpu", threads=1) as plain,
    ):
        assert_parity(plain.run(x), session.run(x), "branches", "float32")


def test_a_machine_that_holds_the_engine_alone(built, machine, truth):
    """No graph: neither its file nor its weights are needed."""
    x = images(3)
    with open_session(built, device="tensorrt") as session:
        expected = session.run(x, NAMES[:3])
    graph, aside = built / "model.onnx", built.parent / "aside"
    aside.mkdir()
    for file in (graph, graph.with_name("model.onnx.data")):
        file.rename(aside / file.name)
    plan = str(aside / "model.onnx").encode()
    manifest = Bundle.open(built).manifest
    write_manifest(built, replace(manifest, engines=()))
    add_engine(built, plan)
    with open_session(built, device="tensorrt") as session:
        assert np.array_equal(session.run(x, NAMES[:3]), expected)


@both
def test_the_bank_is_uploaded_once_and_then_row_by_row(built, machine, truth, workshop, backend):
    cudart, x = machine["cudart"], images(3)
    with open_session(built, device=backend, contexts=2) as session:
        rows = session.adapters.rows
        assert session.adapters.slots == SLOTS[2]
        assert cudart.copied == [rows.nbytes]
        session.run(x, "alpha")
        assert max(cudart.copied[1:]) == x.nbytes
        del cudart.copied[:]
        session.adapters.add("rival", workshop.directory("rival"))
        assert cudart.copied == [rows[0].nbytes]
        truth.adapters.add("rival", workshop.directory("rival"))
        names = ["rival", "alpha", "rival"]
        expected = truth.run(x, names)
        for _ in range(2):  # either context sees the row
            assert_parity(expected, session.run(x, names), "branches", "float32")
        session.adapters.remove("alpha")
        session.adapters.add("alpha", workshop.directory("rival"))
        found = session.run(x, "alpha")
        assert_parity(truth.run(x, "rival"), found, "branches", "float32")


def test_a_row_on_the_device_is_what_the_bank_holds(built, machine, workshop):
    with open_session(built, device="tensorrt") as session:
        session.adapters.add("rival", workshop.directory("rival"))
        session.adapters.remove("gamma")
        backend = session._backend
        found = np.empty_like(session.adapters.rows)
        backend._stream.download(found, backend._address)
        backend._stream.synchronize()
        assert np.array_equal(found, session.adapters.rows)
        assert not found[2].any()
        assert found[3].any()


def test_a_bank_baked_into_the_engine_is_fixed(small, constant, tmp_path, machine, workshop):
    path = copy_bundle(small, tmp_path / "b")
    bank = Bundle.open(path).manifest.files["bank.safetensors"]
    add_engine(path, str(constant / "model.onnx").encode(), slots=None, bank_sha256=bank)
    x, names = images(3), ["gamma", "alpha", "gamma"]
    with (
        open_session(path, device="tensorrt") as session,
        open_session(constant, device="cpu", threads=1) as plain,
    ):
        assert_parity(plain.run(x, names), session.run(x, names), "branches", "float32")
        with pytest.raises(PlanError, match="baked into the graph"):
            session.adapters.add("rival", workshop.directory("rival"))
        with pytest.raises(SessionError, match="baked into this graph or engine"):
            session.adapters.remove("alpha")
    with open_session(path, device="cpu", threads=1) as free:
        free.adapters.remove("alpha")


@pytest.mark.parametrize("contexts", [1, 3])
def test_threads_share_the_contexts(built, machine, truth, contexts):
    x = {name: images(6, seed=i) for i, name in enumerate(("alpha", "gamma"))}
    expected = {name: truth.run(x[name], name) for name in x}
    answers = {name: [] for name in x}
    with open_session(built, device="tensorrt", contexts=contexts) as session:
        assert len(machine["tensorrt"].engines) == 1

        def ask(name):
            for _ in range(15):
                answers[name].append(session.run(x[name], name))

        threads = [threading.Thread(target=ask, args=(name,)) for name in [*x, *x]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(machine["tensorrt"].engines[0].contexts) == contexts
    for name, found in answers.items():
        assert len(found) == 30
        for logits in found:
            assert_parity(expected[name], logits, "branches", "float32")
    assert machine["cudart"].clean


def test_a_run_waits_while_all_contexts_are_busy(built, machine):
    with open_session(built, device="tensorrt") as session:
        lane = session._backend._free.get()
        answers = []
        thread = threading.Thread(target=lambda: answers.append(session.run(images(2), "alpha")))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not answers
        session._backend._free.put(lane)
        thread.join(10)
        assert len(answers) == 1


def test_a_closed_session_frees_everything_and_answers(built, machine):
    session = open_session(built, device="tensorrt", contexts=2)
    backend = session._backend
    session.run(images(2), "alpha")
    session.close()
    assert machine["cudart"].clean
    with pytest.raises(SessionError, match="closed"):
        backend.run(images(2), np.array([1, 1]))
    backend.row_changed(1)  # writes to no memory that was freed


def test_a_run_that_fails_quotes_tensorrt_and_gives_its_context_back(built, machine):
    with open_session(built, device="tensorrt") as session:
        engine = machine["tensorrt"].engines[0]
        engine.fails = True
        with pytest.raises(DeviceError, match=r"tensorrt 99\.1 .*batch of 2: .*told to fail"):
            session.run(images(2), "alpha")
        engine.fails = False
        assert session.run(images(2), "alpha").shape == (2, 7)


@both
def test_a_gpu_that_is_full(built, machine, backend):
    machine["cudart"].left = 4096
    with pytest.raises(DeviceError, match=r"out of memory .* fewer `slots` or `contexts`"):
        open_session(built, device=backend)
    assert machine["cudart"].clean


def test_a_plan_that_tensorrt_refuses(small, tmp_path, machine):
    path = copy_bundle(small, tmp_path / "b")
    add_engine(path, b"not an engine")
    with pytest.raises(BundleError, match=r"cannot load .*magic tag does not match"):
        open_session(path, device="tensorrt")


# --- CUDA graphs --------------------------------------------------------------------------------


def test_graphs_are_recorded_once_per_size_and_replayed(built, machine, truth):
    """The stand-in raises if a context is changed after a graph was recorded from it."""
    cudart = machine["cudart"]
    with open_session(built, device="tensorrt", cuda_graphs=True) as session:
        for turn in range(3):
            for count in (3, 5, 1, 7, 2):
                x, names = images(count, seed=10 * turn + count), NAMES[:count]
                found = session.run(x, names)
                assert_parity(truth.run(x, names), found, "branches", "float32")
        # 3, 5, 1 -> 2, 7 -> 5 and 2: three sizes.
        assert len(cudart.graphs) == 3
        assert cudart.replays == 3 * 6 - 3
        engine = machine["tensorrt"].engines[0]
        assert len(engine.contexts) == 3 + 1  # one was ready for the usual size, 4
        held = list(session._backend._free.queue)  # as the traceback of an error would
    assert held
    assert not engine.contexts
    assert cudart.clean


def test_a_replay_sees_rows_that_changed(built, machine, truth, workshop):
    x = images(4)
    with open_session(built, device="tensorrt", cuda_graphs=True) as session:
        session.run(x, "alpha")
        session.adapters.add("rival", workshop.directory("rival"))
        truth.adapters.add("rival", workshop.directory("rival"))
        found = session.run(x, "rival")
        assert machine["cudart"].replays == 1
        assert_parity(truth.run(x, "rival"), found, "branches", "float32")


@pytest.mark.parametrize("wanted", [True, False])
def test_tensorrt_rtx_records_its_graphs_itself(built, machine, wanted):
    with open_session(built, device="tensorrt-rtx", cuda_graphs=wanted) as session:
        session.run(images(2), "alpha")
        (config,) = machine["tensorrt-rtx"].configs
        assert config.cuda_graph_strategy == ("WHOLE_GRAPH_CAPTURE" if wanted else None)
        assert not machine["cudart"].graphs


# --- compiled kernels ---------------------------------------------------------------------------


def loaded_kernels(machine, path, **options):
    with open_session(path, device="tensorrt-rtx", **options):
        return machine["tensorrt-rtx"].configs[-1].cache.loaded


def test_kernels_are_kept_for_the_next_session(built, machine, cache):
    assert loaded_kernels(machine, built) is None
    (file,) = (cache / "kernels").iterdir()
    assert loaded_kernels(machine, built) == b"kernels"
    flip_byte(file)
    assert loaded_kernels(machine, built) is None  # compiled again, and stored again
    assert loaded_kernels(machine, built) == b"kernels"
    file.write_bytes(b"")
    assert loaded_kernels(machine, built) is None


def test_kernels_are_kept_where_the_session_says_or_nowhere(built, machine, cache, tmp_path):
    assert loaded_kernels(machine, built, cache=None) is None
    assert loaded_kernels(machine, built, cache=tmp_path / "mine") is None
    assert loaded_kernels(machine, built, cache=tmp_path / "mine") == b"kernels"
    assert not cache.exists()
    loaded_kernels(machine, built)
    assert loaded_kernels(machine, built, cache=None) is None  # nor are they read


def test_without_a_cache_tensorrt_rtx_records_its_graphs_itself_all_the_same(built, machine):
    with open_session(built, device="tensorrt-rtx", cuda_graphs=True, cache=None) as session:
        session.run(images(2), "alpha")
        (config,) = machine["tensorrt-rtx"].configs
        assert config.cuda_graph_strategy == "WHOLE_GRAPH_CAPTURE"
        assert not machine["cudart"].graphs


def test_kernels_belong_to_an_engine_a_version_and_a_gpu(tmp_path):
    given = ("e" * 64, "1.7.1", "Stand-in GPU")
    places = {kernel_cache.kernels_entry(tmp_path, *given).path}
    for index in range(3):
        other = (x + "2" * (i == index) for i, x in enumerate(given))
        places.add(kernel_cache.kernels_entry(tmp_path, *other).path)
    assert len(places) == 4


def test_a_cache_that_cannot_be_written_is_no_error(built, machine, cache):
    cache.write_text("a file where the directory should be")
    with pytest.warns(CacheWarning, match="is used, and not kept"):
        assert loaded_kernels(machine, built) is None


def test_plain_tensorrt_has_no_kernel_cache(built, machine, cache):
    with open_session(built, device="tensorrt") as session:
        session.run(images(2), "alpha")
    assert not machine["tensorrt"].configs
    assert not cache.exists()
