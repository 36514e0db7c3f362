"""What Prometheus scrapes: Triton's names, and what only a bank of adapters has.

Triton's counters end without `_total`, which prometheus-client's own counters cannot; so the
numbers are kept here, and a collector hands them over when they are asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from hhdeploy.errors import HhdeployError, require
from hhdeploy.runtime.serving.errors import refusal_kind
from hhdeploy.runtime.serving.messages import VERSION

# Seconds; an adapter of ViT-B size takes about 0.01.
_LOAD_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)
# Seconds of a request.
_LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# Adapters with a histogram of their own, the first that were asked for; and the name of the others
# together, which no adapter can have.
_MOST_HISTOGRAMS, OTHERS = 100, "(others)"
# Triton's words for why a request failed.
_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
# Requests answered lately, for the page's latencies.
_RECENT = 512


@dataclass(frozen=True)
class Now:
    """What is read at the moment of a scrape.

    Attributes:
        rows_used, rows: of the bank, the backbone's left out; 0, 0 of a folded bundle.
        queued, pending: images and requests that wait.
        runs: batches that were run.
        evictions: adapters that lost their row to another one.
        load_failures: adapters that could not be loaded.
        adapters: names that there are; those of adapters that went are forgotten, so that there
            are never more series than adapters.
    """

    rows_used: int
    rows: int
    queued: int
    pending: int
    runs: int
    evictions: int
    load_failures: int
    adapters: frozenset[str]


@dataclass
class Tally:
    """Requests that an adapter answered, alone or with others, in Triton's terms."""

    success: int = 0
    failure: int = 0
    images: int = 0
    microseconds: Sequence[int] = (0,) * 5

    def add(self, images: int, microseconds: Sequence[int]) -> None:
        """One more; ``microseconds``: all, waiting, decoding, in its batch, after it."""
        self.success += 1
        self.images += images
        self.microseconds = _sums(self.microseconds, microseconds)


def _sums(totals: Sequence[int], more: Sequence[int]) -> list[int]:
    return [total + each for total, each in zip(totals, more, strict=True)]


class Metrics:
    """Counts of one server; written on its event loop only."""

    def __init__(self, model: str) -> None:
        self._labels = {"model": model, "version": VERSION}
        self.success = 0
        self.failures = dict.fromkeys(_REASONS, 0)
        self.images = 0
        # As a tally's, of all requests.
        self.microseconds: Sequence[int] = (0,) * 5
        self.adapters: dict[str, int] = defaultdict(int)
        # By adapter, of all requests that named it in some way.
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.refusals: dict[str, int] = defaultdict(int)
        self.recent: deque[float] = deque(maxlen=_RECENT)
        self._loads = _Histogram(_LOAD_BUCKETS)
        self._latencies: dict[str, _Histogram] = {}

    def answered(
        self,
        images: dict[str, int],
        *,
        request: float,
        queue: float,
        prepare: float,
        run: float,
        finish: float,
    ) -> None:
        """A request was answered.

        Args:
            images: by adapter.
            request, queue, prepare, run, finish: seconds: all, waiting, decoding, in its batch,
                after it.
        """
        self.success += 1
        microseconds = [round(1e6 * each) for each in (request, queue, prepare, run, finish)]
        for adapter, count in images.items():
            self.adapters[adapter] += count
            self.images += count
            self.tallies[adapter].add(count, microseconds)
            self._latency(adapter).add(request)
        self.microseconds = _sums(self.microseconds, microseconds)
        self.recent.append(request)

    def failed(self, reason: str, adapter: str | None = None) -> None:
        """A request was refused or failed, with Triton's word for why; ``adapter``: as its model,
        one that there is."""
        self.failures[reason] += 1
        if adapter is not None:
            self.tallies[adapter].failure += 1

    def refused(self, error: HhdeployError) -> None:
        """A request of any kind was refused, whether or not it could be read."""
        self.refusals[refusal_kind(error)] += 1

    def forget(self, names: frozenset[str]) -> None:
        """Leave out the adapters that are not among these."""
        for counts in (self.adapters, self.tallies):
            for name in counts.keys() - names:
                del counts[name]

    def loaded(self, seconds: float) -> None:
        """An adapter was loaded."""
        self._loads.add(seconds)

    def _latency(self, adapter: str) -> _Histogram:
        """Where the requests of an adapter are counted."""
        if adapter not in self._latencies:
            if len(self._latencies) >= _MOST_HISTOGRAMS:
                adapter = OTHERS
            self._latencies.setdefault(adapter, _Histogram(_LATENCY_BUCKETS))
        return self._latencies[adapter]

    def exposition(self, now: Now) -> tuple[bytes, str]:
        """The text of a scrape, and its content type."""
        client = require("prometheus_client", "serve", "metrics")
        registry = client.CollectorRegistry()
        registry.register(Collector(lambda: self.families(now)))
        registry.register(client.ProcessCollector(registry=None))
        return client.generate_latest(registry), client.CONTENT_TYPE_LATEST

    def families(self, now: Now) -> Iterator[Any]:
        """The metric families, prometheus-client's."""
        core = require("prometheus_client.core", "serve", "metrics")

        def counter(name: str, text: str, *samples: tuple[dict[str, str], float]) -> Any:
            family = core.Metric(name, text, "untyped")
            for labels, value in samples:
                family.add_sample(name, self._labels | labels, value)
            return family

        def gauge(name: str, text: str, value: float) -> Any:
            family = core.GaugeMetricFamily(name, text)
            family.add_metric([], value)
            return family

        one: dict[str, str] = {}
        yield counter(
            "nv_inference_request_success", "Requests that were answered", (one, self.success)
        )
        yield counter(
            "nv_inference_request_failure",
            "Requests that were not",
            *(({"reason": r}, self.failures[r]) for r in _REASONS),
        )
        yield counter("nv_inference_count", "Images that were classified", (one, self.images))
        yield counter("nv_inference_exec_count", "Batches that were run", (one, now.runs))
        parts = (
            ("request", "in all"),
            ("queue", "waiting"),
            ("compute_input", "decoding and checking"),
            ("compute_infer", "in the batch"),
            ("compute_output", "writing the answer"),
        )
        for (name, text), value in zip(parts, self.microseconds, strict=True):
            yield counter(
                f"nv_inference_{name}_duration_us",
                f"Microseconds of requests, {text}",
                (one, value),
            )
        pending = core.Metric("nv_inference_pending_request_count", "Requests that wait", "gauge")
        pending.add_sample("nv_inference_pending_request_count", self._labels, now.pending)
        yield pending
        per_adapter = core.CounterMetricFamily(
            "hhdeploy_adapter_images", "Images that were classified, by adapter", labels=["adapter"]
        )
        self.forget(now.adapters)
        for adapter, count in self.adapters.items():
            per_adapter.add_metric([adapter], count)
        yield per_adapter
        yield refusal_family(self.refusals)
        yield gauge("hhdeploy_queued_images", "Images that wait", now.queued)
        yield gauge("hhdeploy_bank_rows_used", "Rows of the bank that adapters take", now.rows_used)
        yield gauge("hhdeploy_bank_rows", "Rows of the bank there are for adapters", now.rows)
        yield core.CounterMetricFamily(
            "hhdeploy_adapter_evictions",
            "Adapters that lost their row to another one",
            value=now.evictions,
        )
        yield core.CounterMetricFamily(
            "hhdeploy_adapter_load_failures",
            "Adapters that could not be loaded",
            value=now.load_failures,
        )
        loads = core.HistogramMetricFamily(
            "hhdeploy_adapter_load_seconds", "Reading, checking and packing an adapter"
        )
        loads.add_metric([], *self._loads.totals())
        yield loads
        for name in self._latencies.keys() - now.adapters - {OTHERS}:
            del self._latencies[name]
        latencies = core.HistogramMetricFamily(
            "hhdeploy_request_seconds",
            "Requests that were answered, by adapter: one that names several counts for each",
            labels=["adapter"],
        )
        for adapter, histogram in self._latencies.items():
            latencies.add_metric([adapter], *histogram.totals())
        yield latencies


class _Histogram:
    """Counts of values up to each of some bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def totals(self) -> tuple[list[tuple[str, float]], float]:
        """As prometheus-client takes them: buckets, each with those below it, and the sum."""
        names = (*map(str, self._bounds), "+Inf")
        return [*zip(names, map(float, accumulate(self._counts)), strict=True)], self._sum


def refusal_family(refusals: Mapping[str, int]) -> Any:
    """The family of what was refused, by reason."""
    core = require("prometheus_client.core", "serve", "metrics")
    family = core.CounterMetricFamily(
        "hhdeploy_refused_requests", "Requests of any kind that were refused", labels=["reason"]
    )
    for reason, count in refusals.items():
        family.add_metric([reason], count)
    return family


def refusals_text(refusals: Mapping[str, int]) -> bytes:
    """The exposition of these alone."""
    client = require("prometheus_client", "serve", "metrics")
    registry = client.CollectorRegistry()
    registry.register(Collector(lambda: iter((refusal_family(refusals),))))
    text: bytes = client.generate_latest(registry)
    return text


def latency_ms(recent: Sequence[float]) -> dict[str, Any]:
    """Percentiles ``p50``, ``p95``, ``p99`` of some milliseconds, and the ``recent`` themselves.

    None for the percentiles of nothing. Several servers' are joined by joining their ``recent``.
    """
    shares = (50, 95, 99)
    found = np.percentile(recent, shares).round(3).tolist() if recent else [None] * len(shares)
    percentiles = {f"p{share}": value for share, value in zip(shares, found, strict=True)}
    return {**percentiles, "recent": [round(value, 3) for value in recent]}


class Collector:
    """What a registry of prometheus-client asks for its families."""

    def __init__(self, collect: Callable[[], Iterator[Any]]) -> None:
        self.collect = collect
