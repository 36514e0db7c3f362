"""How fast engines are, against what users would pick; recorded, never asserted.

Competitors run in turn and start and end with NumPy arrays, transfers included.
"""

from __future__ import annotations

import pytest

from hhdeploy.adapters.format import load_adapter
from hhdeploy.runtime import open_session
from hhdeploy.timing import paired
from tests.gpu.folding import folded_in_torch, logits_in_torch
from tests.gpu.opening import open_on
from tests.gpu.scale import SCALE
from tests.gpu.workbench import LATENCY_PROFILE

MODEL = SCALE.model


@pytest.fixture(params=["float32", "float16"])
def precision(request):
    return request.param


@pytest.fixture
def engine(runner, workbench, precision):
    """All adapters as side branches, CUDA graphs on."""
    path = workbench.engine(MODEL, runner, precision, LATENCY_PROFILE)
    with open_session(path, device=runner, precision=precision, cuda_graphs=True) as session:
        yield session


def compare_with(other, engine, made, record):
    """``other(images, names)`` against the engine; the ratio is engine / other."""
    for batch in SCALE.batches:
        truth = made.truth(batch)
        found = paired(
            lambda t=truth: engine.run(t.images, t.names),
            lambda t=truth: other(t.images, t.names),
            pairs=SCALE.pairs,
            warmup=SCALE.warmup,
        )
        record(**{f"batch {batch}": found})


def test_engine_against_onnxruntime_cuda(engine, ort_cuda, workbench, precision, record):
    made = workbench.model(MODEL)
    with open_on(made.path, ort_cuda, precision=precision) as other:
        compare_with(other.run, engine, made, record)


def test_engine_against_torch(engine, torch_device, workbench, precision, record):
    """torch runs one adapter, folded: the fastest it can do, and less than the engine does."""
    made = workbench.model(MODEL)
    name, _ = made.pair
    network = folded_in_torch(made.spec, load_adapter(made.adapter(name)))
    compare_with(
        lambda images, names: logits_in_torch(network, images, precision, torch_device),
        engine,
        made,
        record,
    )


def test_engine_against_the_folded_engine(engine, runner, workbench, precision, record):
    made = workbench.model(MODEL)
    path, _ = workbench.build(workbench.folded(MODEL), runner, precision, LATENCY_PROFILE)
    options = {"device": runner, "precision": precision, "cuda_graphs": True}
    with open_session(path, **options) as other:
        compare_with(lambda images, names: other.run(images), engine, made, record)


def test_engine_with_cuda_graphs_against_none(engine, runner, workbench, precision, record):
    made = workbench.model(MODEL)
    path = workbench.engine(MODEL, runner, precision, LATENCY_PROFILE)
    with open_session(path, device=runner, precision=precision) as other:
        compare_with(other.run, engine, made, record)
