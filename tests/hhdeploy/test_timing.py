"""Figures of timed runs, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from hhdeploy import timing
from hhdeploy.loadtest.report import Latencies
from hhdeploy.timing import latency, paired


@pytest.fixture
def runs(monkeypatch) -> Callable[[Iterable[float]], timing.Timed]:
    """Makes a function whose runs take these seconds, one after the other."""
    now = 0.0

    def make(seconds: Iterable[float]) -> timing.Timed:
        taking = iter(seconds)

        def run() -> None:
            nonlocal now
            now += next(taking)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    return make


@pytest.mark.parametrize("count", [1, 2, 10, 20])
def test_a_latency_is_told_as_a_load_test_tells_it(runs, count):
    """Of ten runs the ninth decile was the slowest of all."""
    seconds = [1.0 + index / 8 for index in range(count)]
    found = latency(runs(seconds), runs=count, warmup=0)
    right = Latencies.of(seconds)
    assert found.runs == right.count
    assert found.median_ms == pytest.approx(right.p50_ms)
    assert found.p90_ms == pytest.approx(right.p90_ms)
    assert found.min_ms == pytest.approx(1000)


def test_a_slow_first_run_is_no_figure(runs):
    assert latency(runs([9, 9, *[0.5] * 10]), runs=10).p90_ms == pytest.approx(500)


def test_a_ratio_is_of_runs_that_were_neighbours(runs):
    """The machine gets slower by half, for both."""
    a, b = runs([1, 2, 3, 4]), runs([2, 4, 6, 8])
    found = paired(a, b, pairs=4, warmup=0)
    assert (found.ratio, found.low, found.high) == (0.5, 0.5, 0.5)
    assert (found.a.median_ms, found.b.median_ms) == (2500, 5000)
