"""The same bundles in OpenVINO."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.errors import BundleError
from hhdeploy.runtime import open_session
from hhdeploy.runtime.backends import BackendOptions
from tests.support import assert_caught, assert_parity, images

pytest.importorskip("openvino")

NAMES = ["alpha", None, "gamma", "beta", "headless", "rival", "alpha"]


@pytest.fixture(scope="module")
def opened(branches):
    with open_session(branches, device="openvino", threads=1) as session:
        yield session


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
    with open_session(folded, device="openvino", threads=1) as session:
        assert_parity(workshop.truth("alpha", x), session.run(x), "openvino", "float32")


def test_adapters_that_come_and_go_after_opening(small, workshop):
    x = images(3)
    with open_session(small, device="openvino", threads=1, slots=4) as session:
        alpha = session.run(x, "alpha")  # the bank is bound to the request now
        session.adapters.add("rival", workshop.directory("rival"))
        rival = session.run(x, "rival")
        assert_parity(workshop.mixed_truth(["rival"] * 3, x, 7), rival, "openvino", "float32")
        assert np.array_equal(session.run(x, "alpha"), alpha)
        session.adapters.remove("alpha")
        session.adapters.add("alpha", workshop.directory("rival"))
        assert np.array_equal(session.run(x, "alpha"), rival)
        assert not np.array_equal(rival, alpha)


def test_threads_have_requests_of_their_own(opened):
    x = {name: images(3, seed=i) for i, name in enumerate(("alpha", "rival", "beta", "gamma"))}
    expected = {name: opened.run(x[name], name) for name in x}
    wrong = []

    def ask(name):
        for _ in range(20):
            if not np.array_equal(opened.run(x[name], name), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in x]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_constant_bank_gives_nan_for_ids_outside(constant):
    from hhdeploy.runtime.openvino_backend import OpenVinoBackend

    backend = OpenVinoBackend(
        Bundle.open(constant).graph("float32"), None, BackendOptions("float32", 1)
    )
    found = backend.run(images(5), np.array([1, -1, 2, 3, 1], np.int64))
    backend.close()
    assert np.isnan(found[[1, 3]]).all()
    assert not np.isnan(found[[0, 2, 4]]).any()


def test_a_graph_that_cannot_be_read(tmp_path):
    from hhdeploy.runtime.openvino_backend import OpenVinoBackend

    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"OpenVINO cannot compile .*model\.onnx"):
        OpenVinoBackend(tmp_path / "model.onnx", None, BackendOptions("float32", 1))
