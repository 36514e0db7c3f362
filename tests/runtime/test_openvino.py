"""The same bundles in OpenVINO: precisions, hints, a bank in shared memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest

import hhdeploy.runtime.onnxruntime_backend
import hhdeploy.runtime.openvino_backend
from hhdeploy.bundle import Bundle
from hhdeploy.calibration.qdq import FORMATS, find_sites, quantised_model
from hhdeploy.calibration.scales import SiteScale
from hhdeploy.errors import BundleError, DeviceError, MissingDependencyError, SessionError
from hhdeploy.exporters.writer import save_graph
from hhdeploy.files.writing import sha256_of
from hhdeploy.parity import bound, compare
from hhdeploy.runtime import open_session
from hhdeploy.runtime.openvino_backend import (
    OpenVinoBackend,
    computes_bfloat16,
)
from hhdeploy.runtime.processor import overflows_in_int8
from hhdeploy.verifying.graphs import add_graph
from tests.support import assert_caught, assert_parity, images
from tests.workshop import copy_bundle

openvino = pytest.importorskip("openvino")

NAMES = ["alpha", None, "gamma", "beta", "headless", "rival", "alpha"]
started = partial(open_session, device="openvino", threads=1, cache=None)
needs_bfloat16 = pytest.mark.skipif(
    not computes_bfloat16(), reason="OpenVINO computes no bfloat16 on this processor"
)


@pytest.fixture(scope="module")
def opened(branches):
    with started(branches) as session:
        yield session


def test_a_signal_arrives_after_sessions_that_ended_in_any_order(branches):
    """OpenVINO's alternate signal stacks, unmapped under the threads that had them, ended it."""
    code = """
import gc, signal, sys
from hhdeploy import open_session
signal.signal(signal.SIGUSR1, lambda *_: print("arrived"))
opened = [open_session(sys.argv[1], device="openvino", threads=1, cache=None) for _ in range(2)]
while opened:
    opened.pop(0).close()
    gc.collect()
    signal.raise_signal(signal.SIGUSR1)
"""
    command = [sys.executable, "-c", code, str(branches)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "arrived\n" * 2), done.stderr


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_mixed_batch_is_the_training_time_model(opened, workshop, batch):
    names, x = NAMES[:batch], images(batch, seed=batch)
    found = opened.run(x, names)
    assert found.dtype == np.float32
    truth = workshop.mixed_truth(names, x)
    assert_parity(truth, found, "openvino", "float32")


def test_the_wrong_adapter_is_caught(opened, workshop):
    x = images(3)
    truth = workshop.mixed_truth(["alpha"] * 3, x)
    assert_caught(truth, opened.run(x, "rival"), "openvino", "float32")
    assert opened.device == "openvino CPU"


def test_a_folded_bundle(folded, workshop):
    x = images(5)
    with started(folded) as session:
        assert_parity(workshop.truth("alpha", x), session.run(x), "openvino", "float32")


def test_adapters_that_come_and_go_after_opening(small, workshop):
    x = images(3)
    with started(small, slots=4) as session:
        alpha = session.run(x, "alpha")  # the bank is bound to the request now
        session.adapters.add("rival", workshop.directory("rival"))
        rival = session.run(x, "rival")
        assert_parity(workshop.mixed_truth(["rival"] * 3, x, 7), rival, "openvino", "float32")
        assert np.array_equal(session.run(x, "alpha"), alpha)
        session.adapters.remove("alpha")
        session.adapters.add("alpha", workshop.directory("rival"))
        assert np.array_equal(session.run(x, "alpha"), rival)
        assert not np.array_equal(rival, alpha)


def test_a_row_is_seen_as_it_changes_without_a_copy(small):
    x = images(3)
    with started(small, slots=4) as session:
        alpha, gamma = session.run(x, "alpha"), session.run(x, "gamma")
        bank = session._backend._requests.it.get_tensor("adapter_bank").data
        assert np.shares_memory(bank, session.adapters.rows)
        row = session.adapters["alpha"].row
        session.adapters.rows[row] = session.adapters.rows[session.adapters["gamma"].row]
        assert np.array_equal(session.run(x, "alpha"), gamma)
        assert not np.array_equal(alpha, gamma)


def test_a_small_model_is_compiled_for_one_image(small, folded, constant, workshop):
    """When the first single image comes, and rows that change meanwhile are seen."""
    x = images(1)
    with started(small, slots=4) as session:
        backend = session._backend
        session.run(images(3), "alpha")
        assert backend._one is None
        alpha, gamma = session.run(x, "alpha"), session.run(x, "gamma")
        assert [list(port.shape) for port in backend._one.inputs] == [
            [1, *x.shape[1:]], [1], list(session.adapters.rows.shape)
        ]  # fmt: skip
        for name, found in (("alpha", alpha), ("gamma", gamma)):
            truth = workshop.mixed_truth([name], x, found.shape[1])
            assert_parity(truth, found, "openvino", "float32")
        session.adapters.add("rival", workshop.directory("rival"))
        rival = session.run(x, "rival")
        truth = workshop.mixed_truth(["rival"], x, rival.shape[1])
        assert_parity(truth, rival, "openvino", "float32")
        assert_caught(truth, alpha, "openvino", "float32")
        assert np.array_equal(session.run(x, "alpha"), alpha)
    for path in (folded, constant):
        with started(path) as session:
            found = session.run(x, "alpha")
            assert session._backend._one is not None
            truth = workshop.mixed_truth(["alpha"], x, found.shape[1])
            assert_parity(truth, found, "openvino", "float32")


def test_a_large_model_or_one_that_is_gone_answers_one_image_as_any(small, tmp_path, monkeypatch):
    path = copy_bundle(small, tmp_path / "b")
    x = images(1)
    with started(path) as session:
        for file in path.glob("model.onnx*"):
            file.unlink()
        found = session.run(x, "alpha")
        assert session._backend._one is None
    monkeypatch.setattr(hhdeploy.runtime.openvino_backend, "_SMALL", 1)
    with started(small) as session:
        assert np.array_equal(session.run(x, "alpha"), found)
        assert session._backend._one is None


def test_images_that_may_not_be_written(opened):
    x = images(3)
    expected = opened.run(x, "alpha")
    x.setflags(write=False)
    assert np.array_equal(opened.run(x, "alpha"), expected)


def test_a_constant_bank_gives_nan_for_ids_outside(constant):
    with started(constant) as session:
        found = session._backend.run(images(5), np.array([1, -1, 2, 3, 1], np.int64))
    assert np.isnan(found[[1, 3]]).all()
    assert not np.isnan(found[[0, 2, 4]]).any()


def test_a_run_that_openvino_refuses(opened):
    with pytest.raises(DeviceError, match="openvino CPU failed: "):
        opened._backend.run(images(3, size=31), np.array([1, 1, 1], np.int64))


def with_file(bundle, name, content):
    """The manifest agrees with a file that was exchanged."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "hhdeploy.json").read_text())
    manifest["files"][name] = sha256_of(bundle / name)
    (bundle / "hhdeploy.json").write_text(json.dumps(manifest))
    return bundle


def test_a_graph_that_cannot_be_read(folded, tmp_path):
    path = with_file(copy_bundle(folded, tmp_path / "b"), "model.onnx", b"not a graph")
    with pytest.raises(BundleError, match=r"OpenVINO cannot compile .*model\.onnx"):
        started(path)


def test_a_bundle_of_links(folded, tmp_path):
    """As the hub's cache has it."""
    for file in folded.iterdir():
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(BundleError, match=r"model\.onnx: its weights are a link, .* \(cp -rL\)"):
        started(tmp_path)


# --- versions -----------------------------------------------------------------------------------


@pytest.fixture
def outdated(monkeypatch):
    """The last version below the bound, as it names itself."""
    monkeypatch.setattr(openvino, "__version__", "2024.6.0-17404-4c0f47d2335-releases/2024/6")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_an_openvino_below_the_bound_is_refused(small, outdated, precision):
    """2024.6 computes INT8 side branches wrongly; no session trusts it with anything."""
    expected = r"expected version 2025\.0 or newer, found 2024\.6\.0.*pip install -U"
    with pytest.raises(MissingDependencyError, match=expected):
        open_session(small, device="openvino", precision=precision)


def test_auto_passes_over_an_openvino_below_the_bound(small, outdated, monkeypatch):
    monkeypatch.setattr("hhdeploy.runtime.onnxruntime_backend.cuda_available", lambda: False)
    with open_session(small, threads=1) as session:
        assert session.device == "onnxruntime CPUExecutionProvider"
    assert not computes_bfloat16()
    with pytest.raises(MissingDependencyError, match="found 2024"):  # nothing else has it
        open_session(small, precision="bfloat16")


# --- precisions ---------------------------------------------------------------------------------


@needs_bfloat16
def test_bfloat16_is_the_float32_graph_computed_in_bfloat16(branches, opened, workshop):
    assert "bfloat16" not in Bundle.open(branches).manifest.graphs
    x = images(7)
    truth = workshop.mixed_truth(NAMES, x)
    with started(branches, precision="bfloat16") as session:
        found = session.run(x, NAMES)
        assert session.device == "openvino CPU bfloat16"
        assert_parity(truth, found, "openvino", "bfloat16")
        assert_caught(truth, session.run(x, "rival"), "openvino", "bfloat16")
    assert not np.array_equal(found, opened.run(x, NAMES))
    assert_caught(truth, found, "openvino", "float32")


def test_bfloat16_is_refused_where_the_processor_has_none(small, monkeypatch):
    class Old:
        def get_property(self, device, name):
            return ["FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else "Old CPU"

    monkeypatch.setattr(hhdeploy.runtime.openvino_backend, "shared_core", Old)
    assert not computes_bfloat16()
    with pytest.raises(SessionError, match=r"not compute in it on Old CPU \(it has FP32, INT8\)"):
        started(small, precision="bfloat16")


@pytest.mark.parametrize("precision", ["int8", "fp8", "int8-weights"])
def test_quantised_graphs(small, tmp_path, precision):
    """Scales by hand: wide enough for these activations, so that only rounding is left."""
    path = copy_bundle(small, tmp_path / "b")
    bundle = Bundle.open(path)
    model = ir.load(bundle.graph("float32"))
    classifier = bundle.manifest.backbone.classifier
    scales = {name: SiteScale(8.0) for name in find_sites(model.graph, classifier)}
    low = quantised_model(model, scales, FORMATS[precision], classifier)
    add_graph(bundle, precision, lambda target: save_graph(low, target), lambda candidate: [])
    x, names = images(5), ["alpha", "gamma", "gamma", "alpha", "gamma"]
    with (
        started(path) as exact,
        started(path, precision=precision) as session,
        open_session(path, device="cpu", precision=precision, threads=1) as other,
    ):
        float32, found = exact.run(x, names), session.run(x, names)
        assert_parity(float32, found, "quantised", precision)
        assert_parity(other.run(x, names), found, "quantised", precision)
        # It is quantised: further away than float32 may be.
        assert compare(float32, found).failures(bound("openvino", "float32"))
        # INT8 leaves the rest to the processor's fastest type, and says so.
        low = precision == "int8" and computes_bfloat16()
        plain = f"openvino CPU{' bfloat16' if low else ''}"
        exact = precision != "int8" or not overflows_in_int8()
        assert session.device.startswith(plain)
        assert ("overflow" in session.device) is not exact


# --- hints --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hint", "streams"), [("latency", 1), ("throughput", 2)])
def test_a_hint_divides_the_threads(small, own, hint, streams):
    x = images(3)
    with started(small, hint=hint, threads=2) as session:
        assert session._backend._model.get_property("NUM_STREAMS") == streams
        assert_parity(own.run(x, "alpha"), session.run(x, "alpha"), "openvino", "float32")


def test_an_unknown_hint_and_a_device_without_any(small):
    with pytest.raises(SessionError, match="expected latency or throughput, found 'fast'"):
        started(small, hint="fast")
    with pytest.raises(SessionError, match=r"`hint='throughput'`: `device='cpu'` has none"):
        open_session(small, device="cpu", hint="throughput")


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_threads_have_requests_of_their_own(small, hint):
    with started(small, hint=hint, threads=2) as session:
        x = {(name, i): images(3, seed=i) for i in range(2) for name in ("alpha", "gamma")}
        expected = {key: session.run(x[key], key[0]) for key in x}
        wrong, answers = [], []

        def ask(key):
            for _ in range(20):
                right = np.array_equal(session.run(x[key], key[0]), expected[key])
                (answers if right else wrong).append(key)

        threads = [threading.Thread(target=ask, args=(key,)) for key in x]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert isinstance(session._backend, OpenVinoBackend)
    assert not wrong
    assert len(answers) == 80
