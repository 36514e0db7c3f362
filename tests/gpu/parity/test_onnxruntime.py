"""ONNX Runtime's providers for NVIDIA GPUs: the ladder, batches, rows, CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest

from hhdeploy.verifying.bundles import verify
from tests.gpu.opening import check_device, open_on
from tests.gpu.parity.rows import changing_rows
from tests.gpu.scale import SCALE
from tests.gpu.wants import lacks
from tests.support import assert_caught, assert_parity

MODEL = SCALE.models[0]
BATCHES = (1, 2, 3, 7, 8, 13, 29)


@pytest.mark.parametrize("graph", ["folded", "side branches"])
@pytest.mark.parametrize("model", SCALE.models)
def test_parity(provider, workbench, model, graph, precision, record):
    """Every adapter and the bare backbone, mixed batches, against the float64 reference."""
    path = workbench.bundle(model, graph)
    record(model=model, graph=graph, precision=precision, device=provider)
    report = verify(path, device=provider, precisions=[precision])
    found = [stage.comparison for stage in report.stages]
    (runtime,) = {stage.runtime for stage in report.stages}
    record(
        runtime=runtime,
        range_error=max(c.range_error for c in found),
        cosine=min(c.cosine for c in found),
        top1=min(c.top1 for c in found),
    )
    check_device(runtime, provider, path, precision)
    assert {stage.stage for stage in report.stages} == {"engine"}
    assert report.passed, report.explain_failures()


@pytest.fixture(params=[False, True], ids=["launched", "CUDA graphs"])
def opened(request, provider, workbench):
    """What a model must answer, and a session on its float32 side branches."""
    if request.param and provider != "cuda":
        lacks("chip", f"device={provider!r} records no CUDA graphs")
    made = workbench.model(MODEL)
    with open_on(made.path, provider, slots=8, cuda_graphs=request.param) as session:
        yield made, session


def test_any_batch(opened):
    made, session = opened
    # Twice over: with CUDA graphs the first run of a size records, the second one replays.
    for count in (*BATCHES, *BATCHES):
        truth = made.truth(count)
        found = session.run(truth.images, truth.names)
        assert_parity(truth.logits, found, "engine", "float32")


def test_the_wrong_adapter_is_caught_and_rows_change(opened):
    made, session = opened
    right, wrong = made.pair
    truth, other = made.truth_of(right), made.truth_of(wrong)
    assert_parity(truth.logits, session.run(truth.images, right), "engine", "float32")
    assert_caught(truth.logits, session.run(truth.images, wrong), "engine", "float32")
    session.adapters.add("guest", made.adapter(wrong))
    assert_parity(other.logits, session.run(other.images, "guest"), "engine", "float32")
    session.adapters.add("guest", made.adapter(right), replace_existing=True)
    assert_parity(truth.logits, session.run(truth.images, "guest"), "engine", "float32")
    session.adapters.remove("guest")
    assert_parity(truth.logits, session.run(truth.images, right), "engine", "float32")


def test_rows_change_while_other_threads_run(opened, record):
    made, session = opened
    runs = changing_rows(made, session, SCALE.changes)
    record(changes=2 * SCALE.changes, runs_meanwhile=runs)


def test_cuda_graphs_change_nothing(ort_cuda, workbench, precision, record):
    made = workbench.model(MODEL)
    same = True
    with (
        open_on(made.path, ort_cuda, precision=precision) as plain,
        open_on(made.path, ort_cuda, precision=precision, cuda_graphs=True) as recorded,
    ):
        for count in (*BATCHES, *BATCHES):
            truth = made.truth(count)
            expected = plain.run(truth.images, truth.names)
            found = recorded.run(truth.images, truth.names)
            same = same and np.array_equal(expected, found)
            assert_parity(truth.logits, found, "engine", precision)
            assert_parity(expected, found, "engine", precision)
    record(precision=precision, equal_to_the_bit=same)
