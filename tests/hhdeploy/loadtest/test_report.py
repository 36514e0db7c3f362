"""What makes a test fail, and how latencies are grouped."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from hhdeploy.errors import SessionError
from hhdeploy.loadtest.churn import Churn, Turnover
from hhdeploy.loadtest.drive import Record
from hhdeploy.loadtest.expected import Expectations
from hhdeploy.loadtest.judge import Exchange, Reply, Verdict
from hhdeploy.loadtest.report import Latencies, latencies, make_report
from hhdeploy.loadtest.scrape import Counts, read_counts
from hhdeploy.loadtest.traffic import Request
from hhdeploy.loadtest.variants import Task
from hhdeploy.parity import bound
from hhdeploy.runtime.serving.metrics import Metrics
from tests.hhdeploy.loadtest.conftest import scraped

REQUEST = Request(0, (0,), None)
COUNTS = Counts(1, 1, 1, 0, 0.0, 0, {"request": 0.1}, 1.0, 1e8)
EXPECTED = Expectations(["alpha"], [[np.ones((1, 2), np.float32)]], bound("branches", "float32"))


def record_of(*answers: Reply, counts: Counts | None = COUNTS, changes=(), at_start=True) -> Record:
    churn = Churn([Task("alpha", (), at_start)], np.ones(1), seed=0)
    churn.changes.extend(changes)
    exchanges = [Exchange(REQUEST, 1.0, 1.0, 2.0, answer) for answer in answers]
    return Record(exchanges, churn, 2.0, 0.5, counts, 1e8)


def report_of(record, exit_code=0):
    return make_report(record, EXPECTED, exit_code, lambda done, total: None)


def test_expected_refusals_pass():
    report = report_of(record_of(Reply(404), Reply(404), at_start=False))
    assert report.passed
    assert report.verdicts[Verdict.REFUSED] == report.requests == 2
    assert report.to_json()["passed"] is True


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (Reply(200, b"?"), Verdict.WRONG),
        (Reply(429, b"busy"), Verdict.UNEXPECTED),
        (Reply(0, b"reset"), Verdict.LOST),
        (Reply(None), Verdict.UNANSWERED),
    ],
)
def test_one_fault_among_many_fails(answer, verdict):
    report = report_of(record_of(*[Reply(404)] * 50, answer, at_start=False))
    assert not report.passed
    assert report.verdicts[verdict] == 1
    (fault,) = report.faults
    assert fault.startswith(f"{verdict.value}: alpha")
    assert report.statuses == ({429: 1} if verdict is Verdict.UNEXPECTED else {})


def said(logits) -> Reply:
    """A right answer, of the protocol."""
    output = {"name": "logits", "datatype": "FP32", "shape": list(logits.shape)}
    head = json.dumps({"outputs": [output]}).encode()
    return Reply(200, head + logits.astype("<f4").tobytes(), len(head))


def test_what_was_answered_is_counted_and_what_was_refused_has_no_latency():
    record = record_of(Reply(404), Reply(404), at_start=False)
    record.churn.timelines[0].change(0, 0.5, 1.5)
    record.churn.changes.append(Turnover("alpha", "add", 0.5, 1.5, Reply(200)))
    answer = said(np.ones((2, 2), np.float32))
    record.exchanges.append(Exchange(Request(0, (0, 0), None), 1.0, 1.0, 1.25, answer))
    content = report_of(record).to_json()
    assert content["passed"]
    assert (content["requests_per_second"], content["images_per_second"]) == (1.5, 1.0)
    assert content["latencies"]["all"] == asdict(Latencies.of([0.25]))
    assert content["changes"] == {"add": asdict(Latencies.of([1.0]))}


def test_a_request_that_was_sent_late_saw_nothing_earlier():
    """When it was due the old version was there; when it was sent the new one was acknowledged."""
    old, new = np.asarray([[1, 0]], np.float32), np.asarray([[0, 1]], np.float32)
    expected = Expectations(["alpha"], [[old, new]], bound("branches", "float32"))
    record = record_of()
    record.churn.timelines[0].change(1, 2.0, 3.0)
    record.exchanges.append(Exchange(REQUEST, 1.0, 4.0, 5.0, said(old)))
    report = make_report(record, expected, 0, lambda done, total: None)
    assert report.verdicts[Verdict.WRONG] == 1


def test_the_first_faults_are_told():
    report = report_of(record_of(*(Reply(500, str(number).encode()) for number in range(12))))
    assert [fault[-1] for fault in report.faults] == list("0123456789")
    assert report.faulty == 12


def test_a_change_that_was_refused_fails():
    change = Turnover("alpha", "replace", 1.0, 2.0, Reply(500, b"no room"))
    report = report_of(record_of(changes=[change]))
    assert not report.passed
    assert report.statuses == {500: 1}
    assert report.faults == ["replace alpha: status 500: no room"]


def test_a_server_that_died_fails():
    assert not report_of(record_of(counts=None)).passed
    assert not report_of(record_of(), exit_code=-11).passed
    assert not report_of(record_of(), exit_code=None).passed
    assert report_of(record_of()).passed


def test_latency_counts_from_when_a_request_was_due():
    late = Exchange(REQUEST, 1.0, 3.0, 3.5, Reply(200))
    assert latencies([late], [])["all"] == Latencies(1, 2500.0, 2500.0, 2500.0, 2500.0)


def test_requests_during_a_change_are_apart():
    def exchange(sent, answered):
        return Exchange(REQUEST, sent, sent, answered, Reply(200))

    during = [exchange(9, 10.5), exchange(10.2, 10.4), exchange(11, 15), exchange(5, 20)]
    others = [exchange(1, 9), exchange(12.5, 13)]
    change = Turnover("beta", "replace", 10.0, 12.0, Reply(200))
    found = latencies(during + others, [change])
    assert found["while adapters changed"].count == 4
    assert found["otherwise"] == Latencies.of([8.0, 0.5])
    assert found["all"].count == 6


def test_percentiles():
    assert Latencies.of(np.arange(101) / 1e3) == Latencies(101, 50.0, 90.0, 99.0, 100.0)


def test_no_latencies_of_nothing():
    assert Latencies.of([]) == Latencies(0, None, None, None, None)


def test_counts_are_what_the_server_s_metrics_say():
    metrics = Metrics("bundle")
    metrics.answered({"a": 2, "b": 1}, request=0.5, queue=0.25, prepare=0.1, run=0.125, finish=0.01)
    metrics.answered({"a": 1}, request=0.5, queue=0.25, prepare=0.1, run=0.125, finish=0.01)
    metrics.loaded(0.25)
    counts = read_counts(scraped(metrics))
    assert (counts.requests, counts.images, counts.batches) == (2, 4, 2)
    assert (counts.loads, counts.load_seconds, counts.evictions) == (1, 0.25, 5)
    assert counts.seconds["request"] == 1.0
    assert counts.seconds["queue"] == 0.5

    later = replace(counts, images=10, cpu_seconds=None, rss_bytes=7.0)
    assert later.since(counts).images == 6
    assert later.since(counts).cpu_seconds is None
    assert later.since(counts).rss_bytes == 7.0


def test_another_server_s_metrics_are_refused():
    with pytest.raises(SessionError, match="nv_inference_request_success"):
        read_counts("# TYPE up gauge\nup 1\n")
