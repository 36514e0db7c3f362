"""How fast side branches are on ONNX Runtime's CUDA provider; recorded, never asserted.

Competitors run in turn and start and end with NumPy arrays, transfers included.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest

from hhdeploy.adapters.format import load_adapter
from hhdeploy.timing import paired
from tests.gpu.folding import folded_in_torch, logits_in_torch
from tests.gpu.opening import open_on
from tests.gpu.scale import SCALE
from tests.gpu.wants import lacks
from tests.support import assert_parity

MODEL = SCALE.model


def compare(ours, other, made, record):
    """``run(images, names)`` of both at each batch size; the ratio is ours / other."""
    for batch in SCALE.batches:
        truth = made.truth(batch)
        found = paired(
            lambda t=truth: ours(t.images, t.names),
            lambda t=truth: other(t.images, t.names),
            pairs=SCALE.pairs,
            warmup=SCALE.warmup,
        )
        record(**{f"batch {batch}": found})


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_side_branches_against_folded(ort_cuda, workbench, precision, cuda_graphs, record):
    made = workbench.model(MODEL)
    record(model=MODEL, precision=precision, cuda_graphs=cuda_graphs)
    options = {"precision": precision, "cuda_graphs": cuda_graphs}
    with (
        open_on(made.path, ort_cuda, **options) as ours,
        open_on(workbench.folded(MODEL), ort_cuda, **options) as other,
    ):
        record(device=ours.device)
        compare(ours.run, lambda images, names: other.run(images), made, record)


def test_cuda_graphs_against_none(ort_cuda, workbench, precision, record):
    made = workbench.model(MODEL)
    record(model=MODEL, precision=precision)
    with (
        open_on(made.path, ort_cuda, precision=precision, cuda_graphs=True) as ours,
        open_on(made.path, ort_cuda, precision=precision) as other,
    ):
        compare(ours.run, other.run, made, record)


def test_side_branches_against_torch(ort_cuda, torch_device, workbench, precision, record):
    """torch runs one adapter, folded: the fastest it can do, and less than the session does."""
    if precision == "int8":
        lacks("graph", "torch has no INT8 model here")
    made = workbench.model(MODEL)
    record(model=MODEL, precision=precision)
    network = folded_in_torch(made.spec, load_adapter(made.adapter(made.pair[0])))
    with open_on(made.path, ort_cuda, precision=precision) as ours:
        compare(
            ours.run,
            lambda images, names: logits_in_torch(network, images, precision, torch_device),
            made,
            record,
        )


def test_many_slots_against_two(ort_cuda, workbench, record):
    """The same adapter in every row, so that all of the bank is in the GPU's memory."""
    path, made = workbench.single(MODEL), workbench.model(MODEL)
    name, _ = made.pair
    with (
        open_on(path, ort_cuda, slots=SCALE.slots) as many,
        open_on(path, ort_cuda, slots=2) as few,
    ):
        spread = [f"copy{i}" for i in range(7)]
        for copy in spread:
            many.adapters.add(copy, made.adapter(name))
        many.adapters.rows[1:] = many.adapters.rows[1]
        many.adapters.row_changed(1)
        names = [name, *spread]
        record(model=MODEL, slots=SCALE.slots, megabytes=many.adapters.rows.nbytes / 1e6)
        compare(
            lambda images, _: many.run(images, [names[i % 8] for i in range(len(images))]),
            lambda images, _: few.run(images, name),
            made,
            record,
        )


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_adapters_added_while_requests_run(ort_cuda, workbench, cuda_graphs, record):
    """What a change costs, and what it costs the requests of others; every answer is checked."""
    made = workbench.model(MODEL)
    truth, guest = made.truth(8), made.truth_of(made.pair[1])
    adapter, done = load_adapter(made.adapter(made.pair[1])), Event()
    with (
        open_on(made.path, ort_cuda, slots=64, cuda_graphs=cuda_graphs) as session,
        ThreadPoolExecutor(1) as pool,
    ):

        def timed_run() -> float:
            start = time.perf_counter()
            found = session.run(truth.images, truth.names)
            elapsed = time.perf_counter() - start
            assert_parity(truth.logits, found, "engine", "float32")
            return 1e3 * elapsed

        def keep_running() -> list[float]:
            times = [timed_run()]
            while not done.is_set():
                times.append(timed_run())
            return times

        timed_run()
        alone = [timed_run() for _ in range(SCALE.changes)]
        running, changes = pool.submit(keep_running), []
        try:
            for _ in range(SCALE.changes):
                start = time.perf_counter()
                session.adapters.add("guest", adapter)
                changes.append(1e3 * (time.perf_counter() - start))
                found = session.run(guest.images, "guest")
                assert_parity(guest.logits, found, "engine", "float32")
                session.adapters.remove("guest")
        finally:
            done.set()
        meanwhile = running.result()
        bank = session.adapters.rows.nbytes
    record(
        model=MODEL,
        cuda_graphs=cuda_graphs,
        bank_megabytes=bank / 1e6,
        add_ms=statistics.median(changes),
        run_alone_ms=statistics.median(alone),
        run_meanwhile_ms=statistics.median(meanwhile),
        run_meanwhile_p99_ms=float(np.quantile(meanwhile, 0.99)),
    )
