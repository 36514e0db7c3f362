"""What Prometheus scrapes, read back by its own parser."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hhdeploy.runtime.serving.metrics import Metrics, Now

NOW = Now(
    rows_used=2,
    rows=63,
    queued=9,
    pending=4,
    runs=3,
    evictions=5,
    load_failures=6,
    adapters=frozenset({"backbone", "flowers", "birds"}),
)
TRITON = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
}


def scrape(metrics, now=NOW):
    """Sample name and labels -> value."""
    content, kind = metrics.exposition(now)
    assert kind.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def of(samples, name, **labels):
    return samples[name, tuple(sorted(labels.items()))]


@pytest.fixture
def metrics():
    made = Metrics("tiny")
    made.answered(
        {"flowers": 2, "backbone": 1}, request=0.010, queue=0.002, prepare=0.001, run=0.004,
        finish=0.0005,
    )  # fmt: skip
    made.answered({"birds": 1}, request=0.020, queue=0.0, prepare=0.0, run=0.001, finish=0.0)
    return made


def test_triton_s_names_and_labels(metrics):
    metrics.failed("REJECTED")
    metrics.failed("OTHER")
    metrics.failed("OTHER")
    found = scrape(metrics)
    assert {name for name, _ in found} >= TRITON
    labels = {"model": "tiny", "version": "1"}
    expected = {
        "nv_inference_request_success": 2,
        "nv_inference_count": 4,
        "nv_inference_exec_count": 3,
        "nv_inference_request_duration_us": 30_000,
        "nv_inference_queue_duration_us": 2_000,
        "nv_inference_compute_input_duration_us": 1_000,
        "nv_inference_compute_infer_duration_us": 5_000,
        "nv_inference_compute_output_duration_us": 500,
        "nv_inference_pending_request_count": 4,
    }
    for name, value in expected.items():
        assert of(found, name, **labels) == value
    for reason, count in {"REJECTED": 1, "CANCELED": 0, "BACKEND": 0, "OTHER": 2}.items():
        assert of(found, "nv_inference_request_failure", reason=reason, **labels) == count


def test_the_bank_and_its_adapters(metrics):
    found = scrape(metrics)
    assert of(found, "hhdeploy_bank_rows_used") == 2
    assert of(found, "hhdeploy_bank_rows") == 63
    assert of(found, "hhdeploy_queued_images") == 9
    assert of(found, "hhdeploy_adapter_evictions_total") == 5
    assert of(found, "hhdeploy_adapter_load_failures_total") == 6
    for adapter, count in {"flowers": 2, "birds": 1, "backbone": 1}.items():
        assert of(found, "hhdeploy_adapter_images_total", adapter=adapter) == count
    assert any(name == "process_resident_memory_bytes" for name, _ in found)


def test_load_times_are_a_histogram(metrics):
    for seconds in (0.001, 0.0025, 0.004, 7.0):
        metrics.loaded(seconds)
    found = scrape(metrics)
    name = "hhdeploy_adapter_load_seconds"
    expected = {"0.0025": 2, "0.005": 3, "0.01": 3, "5.0": 3, "+Inf": 4}
    for bound, count in expected.items():
        assert of(found, f"{name}_bucket", le=bound) == count
    assert of(found, f"{name}_count") == 4
    assert of(found, f"{name}_sum") == 0.001 + 0.0025 + 0.004 + 7.0


def test_there_are_never_more_series_than_adapters(metrics):
    """Thousands of names come and go in weeks."""
    for week in range(200):
        for number in range(50):
            metrics.answered(
                {f"w{week}n{number}": 1}, request=0, queue=0, prepare=0, run=0, finish=0
            )
        there = frozenset({"backbone", "birds", f"w{week}n7"})
        found = scrape(metrics, replace(NOW, adapters=there))
        names = {labels[0][1] for name, labels in found if name == "hhdeploy_adapter_images_total"}
        assert names == {"backbone", "birds", f"w{week}n7"}
        assert len(metrics.adapters) == 3
    assert metrics.images == 4 + 200 * 50
    assert len(metrics.recent) == 512


def test_names_that_need_escaping(metrics):
    strange = Metrics('a"b\\c\nd')
    found = scrape(strange)
    labels = {"model": 'a"b\\c\nd', "version": "1"}
    assert of(found, "nv_inference_request_success", **labels) == 0


def test_nothing_was_asked_yet():
    found = scrape(Metrics("tiny"))
    labels = {"model": "tiny", "version": "1"}
    assert of(found, "nv_inference_request_duration_us", **labels) == 0
