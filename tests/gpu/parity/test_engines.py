"""TensorRT and TensorRT-RTX engines: build, run, and the ladder up to the engine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import write_manifest
from hhdeploy.errors import BundleError
from hhdeploy.parity import PARITY
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify
from tests.gpu.parity.rows import changing_rows
from tests.gpu.scale import SCALE
from tests.gpu.wants import lacks
from tests.gpu.workbench import PRECISIONS, PROFILE, TYPED
from tests.support import assert_caught, assert_parity
from tests.workshop import copy_bundle

# Below the profile's minimum, within it, above its maximum, and no multiple of it.
BATCHES = (1, 2, 3, 7, 8, 13, 29)


def need_graph(made, precision):
    graphs = Bundle.open(made.path).manifest.graphs
    if precision not in graphs:
        lacks("graph", f"the bundle has none in {precision}")


@pytest.mark.parametrize("precision", [*PRECISIONS, "fp8"])
@pytest.mark.parametrize("model", SCALE.models)
def test_build(builder, workbench, model, precision, record):
    made = workbench.model(model)
    need_graph(made, precision)
    path, entry = workbench.build(made.path, builder, precision)
    record(version=entry.version, seconds=entry.build_seconds, megabytes=entry.bytes / 1e6)
    assert Bundle.open(path).manifest.engines == (entry,)
    assert (entry.backend, entry.precision, entry.batch) == (builder, precision, PROFILE)
    assert Bundle.open(path).file(entry.file).stat().st_size == entry.bytes


@pytest.mark.parametrize("precision", [*PRECISIONS, "fp8"])
@pytest.mark.parametrize("model", SCALE.models)
def test_parity(runner, workbench, model, precision, record):
    """Every adapter and the bare backbone, mixed batches, against the float64 reference."""
    made = workbench.model(model)
    need_graph(made, precision)
    if ("engine", precision) not in PARITY:
        lacks("graph", f"the parity table has no bound of a {precision} engine yet")
    report = verify(
        workbench.engine(model, runner, precision), device=runner, precisions=[precision]
    )
    found = [stage.comparison for stage in report.stages]
    record(
        range_error=max(c.range_error for c in found),
        cosine=min(c.cosine for c in found),
        sqnr_db=min(c.sqnr_db for c in found),
        top1=min(c.top1 for c in found),
    )
    assert report.passed, report.explain_failures()
    assert {stage.stage for stage in report.stages} == {"engine"}
    assert all(runner in stage.runtime for stage in report.stages)


@pytest.fixture(params=TYPED)
def opened(runner, workbench, request):
    """The starter model: what it must answer, its precision, and a session on its engine."""
    precision = request.param
    path = workbench.engine("starter", runner, precision)
    with open_session(path, device=runner, precision=precision) as session:
        yield workbench.model("starter"), precision, session


def test_a_mixed_batch_is_each_image_alone(opened):
    made, precision, session = opened
    truth = made.truth(16)
    mixed = session.run(truth.images, truth.names)
    alone = [session.run(truth.images[i : i + 1], [n]) for i, n in enumerate(truth.names)]
    assert_parity(truth.logits, mixed, "engine", precision)
    assert_parity(np.concatenate(alone), mixed, "engine", precision)


@pytest.mark.parametrize("count", BATCHES)
def test_batches_smaller_and_larger_than_the_profile(opened, count):
    made, precision, session = opened
    truth = made.truth(count)
    found = session.run(truth.images, truth.names)
    assert found.shape == truth.logits.shape
    assert_parity(truth.logits, found, "engine", precision)


def test_row_0_is_the_backbone(opened):
    made, precision, session = opened
    truth = made.truth_of(None)
    assert_parity(truth.logits, session.run(truth.images), "engine", precision)
    name, _ = made.pair
    whole = session.run(truth.images, [name, None] * (len(truth.images) // 2))
    assert_parity(truth.logits[1::2], whole[1::2], "engine", precision)


def test_the_wrong_adapter_is_caught(opened):
    made, precision, session = opened
    for right, wrong in (made.pair, made.pair[::-1]):
        truth = made.truth_of(right)
        assert_parity(truth.logits, session.run(truth.images, right), "engine", precision)
        assert_caught(truth.logits, session.run(truth.images, wrong), "engine", precision)


def test_swapped_rows_are_caught(opened):
    made, precision, session = opened
    first, second = made.pair
    session.adapters.add(first, made.adapter(second), replace_existing=True)
    session.adapters.add(second, made.adapter(first), replace_existing=True)
    for asked, there in (made.pair, made.pair[::-1]):
        truth = made.truth_of(there)
        assert_parity(truth.logits, session.run(truth.images, asked), "engine", precision)
        assert_caught(truth.logits, session.run(truth.images, there), "engine", precision)


def test_rows_change_while_other_threads_run(runner, workbench, record):
    made = workbench.model("starter")
    path = workbench.engine("starter", runner, "float32")
    with open_session(path, device=runner, contexts=2, slots=8) as session:
        record(runs_meanwhile=changing_rows(made, session, 25))


def test_several_contexts_at_the_same_time(runner, workbench):
    made = workbench.model("starter")
    path = workbench.engine("starter", runner, "float32")
    with (
        open_session(path, device=runner, contexts=3) as session,
        ThreadPoolExecutor(6) as pool,
    ):
        truths = [made.truth(count) for count in BATCHES * 4]
        found = pool.map(lambda t: session.run(t.images, t.names), truths)
        for truth, logits in zip(truths, found, strict=True):
            assert_parity(truth.logits, logits, "engine", "float32")


@pytest.mark.parametrize("precision", TYPED)
def test_cuda_graphs_change_nothing(runner, workbench, precision, record):
    made = workbench.model("starter")
    path = workbench.engine("starter", runner, precision)
    same = True
    with (
        open_session(path, device=runner, precision=precision) as plain,
        open_session(path, device=runner, precision=precision, cuda_graphs=True) as recorded,
    ):
        # Twice over: the first run of a size records, the second one replays.
        for count in (*BATCHES, *BATCHES):
            truth = made.truth(count)
            expected = plain.run(truth.images, truth.names)
            found = recorded.run(truth.images, truth.names)
            same = same and np.array_equal(expected, found)
            assert_parity(expected, found, "engine", precision)
            assert_parity(truth.logits, found, "engine", precision)
        name, other = made.pair
        truth = made.truth_of(other)
        recorded.adapters.add(name, made.adapter(other), replace_existing=True)
        found = recorded.run(truth.images, name)
        assert_parity(truth.logits, found, "engine", precision)
    record(equal_to_the_bit=same)


def test_tensorrt_rtx_keeps_the_kernels_it_compiled(
    runner, workbench, tmp_path, monkeypatch, record
):
    if runner != "tensorrt-rtx":
        lacks("package", "tensorrt_rtx: TensorRT compiles when it builds, and keeps nothing")
    monkeypatch.setenv("HHDEPLOY_CACHE", str(tmp_path))
    made = workbench.model("starter")
    path = workbench.engine("starter", runner, "float32")
    truth, seconds, kept = made.truth(8), [], []
    for _ in range(2):
        start = time.perf_counter()
        with open_session(path, device=runner) as session:
            found = session.run(truth.images, truth.names)
            seconds.append(time.perf_counter() - start)
        assert_parity(truth.logits, found, "engine", "float32")
        (file,) = (tmp_path / "kernels").iterdir()
        kept.append(file.stat().st_size)
    assert kept[0] > 0
    record(first_s=seconds[0], second_s=seconds[1], bytes=kept[1])


def test_an_engine_of_another_gpu_is_refused(runner, gpu, workbench, tmp_path):
    path = copy_bundle(workbench.engine("starter", runner, "float32"), tmp_path / "copy")
    bundle = Bundle.open(path)
    (entry,) = bundle.manifest.engines
    other = "sm89" if gpu.architecture == "sm86" else "sm86"
    foreign = replace(entry, architectures=(other,)).to_json()
    write_manifest(path, replace(bundle.manifest, engines=(foreign,)))
    with pytest.raises(BundleError, match=f"built for {other}, this GPU is {gpu.architecture}"):
        open_session(path, device=runner)
