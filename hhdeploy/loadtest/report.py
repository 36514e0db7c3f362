"""Verdicts, latencies and costs of a load test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.loadtest.churn import Turnover
from hhdeploy.loadtest.drive import Record
from hhdeploy.loadtest.expected import Expectations
from hhdeploy.loadtest.judge import FAULTS, Exchange, Verdict, judge
from hhdeploy.loadtest.scrape import Counts

# Faults that are told in full.
_SHOWN = 10


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of ``count`` requests or changes; all but the count None if there are none."""

    count: int
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float | None

    @classmethod
    def of(cls, seconds: Sequence[float] | NDArray[np.float64]) -> Latencies:
        """Of single latencies in seconds."""
        if not len(seconds):
            return cls(0, None, None, None, None)
        found = 1e3 * np.percentile(seconds, (50, 90, 99, 100))
        return cls(len(seconds), *(round(float(x), 3) for x in found))


@dataclass(frozen=True)
class Report:
    """The result of a load test.

    Attributes:
        verdicts: number of requests, by verdict.
        statuses: of what was refused unexpectedly, requests and changes: status -> number.
        faults: the first of them, in words.
        failed_changes: changes of adapters that the server did not do.
        told_apart: see `Expectations.told_apart`.
        seconds: of the load.
        images: of the requests that were answered with logits.
        latencies: of those requests: ``all``, ``while adapters changed`` and ``otherwise``.
        changes: seen by the client, by kind.
        client_cpu_seconds: of the process that sent the requests.
        counts: what the server counted; None: it did not answer any more.
        rss_at_start: of the server, bytes.
        exit_code: of the server when it was told to stop; None: it had to be killed.
    """

    verdicts: Mapping[Verdict, int]
    statuses: Mapping[int, int]
    faults: Sequence[str]
    failed_changes: int
    told_apart: float
    seconds: float
    images: int
    latencies: Mapping[str, Latencies]
    changes: Mapping[str, Latencies]
    client_cpu_seconds: float
    counts: Counts | None
    rss_at_start: float | None
    exit_code: int | None

    @property
    def faulty(self) -> int:
        """Requests that were wrong, refused unexpectedly, lost or unanswered."""
        return sum(self.verdicts[verdict] for verdict in FAULTS)

    @property
    def passed(self) -> bool:
        """Whether there was no fault, and the server lived and ended as it should."""
        sound = self.counts is not None and self.exit_code == 0
        return sound and not self.faulty and not self.failed_changes

    @property
    def requests(self) -> int:
        """All that were sent."""
        return sum(self.verdicts.values())

    def to_json(self) -> dict[str, Any]:
        """The whole, with what follows from it."""
        counts = self.counts
        return {
            "passed": self.passed,
            "verdicts": {verdict.value: number for verdict, number in self.verdicts.items()},
            "refused_statuses": {str(k): v for k, v in self.statuses.items()},
            "faults": list(self.faults),
            "failed_changes": self.failed_changes,
            "told_apart": round(self.told_apart, 6),
            "seconds": round(self.seconds, 3),
            "requests_per_second": round(self.requests / self.seconds, 2),
            "images_per_second": round(self.images / self.seconds, 2),
            "latencies": {name: asdict(found) for name, found in self.latencies.items()},
            "changes": {name: asdict(found) for name, found in self.changes.items()},
            "client_cpu_seconds": round(self.client_cpu_seconds, 3),
            "server": None if counts is None else _rounded(asdict(counts)),
            "server_rss_bytes_at_start": self.rss_at_start,
            "server_exit_code": self.exit_code,
        }


def make_report(
    record: Record,
    expected: Expectations,
    exit_code: int | None,
    progress: Callable[[int, int], None],
) -> Report:
    """Judge every answer of a record.

    Args:
        record: what happened.
        expected: what each version says.
        exit_code: of the server.
        progress: called with the number of answers judged, and of all.
    """
    verdicts = dict.fromkeys(Verdict, 0)
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    for done, exchange in enumerate(record.exchanges, 1):
        timeline = record.churn.timelines[exchange.request.task]
        judgement = judge(exchange, timeline.possible(exchange.sent, exchange.answered), expected)
        verdicts[judgement.verdict] += 1
        if judgement.verdict is Verdict.UNEXPECTED:
            statuses[exchange.answer.status or 0] += 1
        if judgement.verdict in FAULTS:
            faults.append(f"{judgement.verdict.value}: {judgement.detail}")
        if done % 100 == 0 or done == len(record.exchanges):
            progress(done, len(record.exchanges))
    failed = [change for change in record.churn.changes if not change.done]
    for change in failed:
        statuses[change.answer.status or 0] += 1
        said = change.answer.body[:200].decode("utf-8", "replace")
        faults.append(f"{change.kind} {change.name}: status {change.answer.status}: {said}")
    answered = [e for e in record.exchanges if e.answer.status == 200]
    return Report(
        verdicts=verdicts,
        statuses=dict(sorted(statuses.items())),
        faults=faults[:_SHOWN],
        failed_changes=len(failed),
        told_apart=expected.told_apart(),
        seconds=record.seconds,
        images=sum(len(e.request.images) for e in answered),
        latencies=latencies(answered, record.churn.changes),
        changes={
            kind: Latencies.of([c.acknowledged - c.sent for c in of_kind])
            for kind in ("add", "replace", "remove", "load")
            if (of_kind := [c for c in record.churn.changes if c.kind == kind])
        },
        client_cpu_seconds=record.client_cpu_seconds,
        counts=record.counts,
        rss_at_start=record.rss_at_start,
        exit_code=exit_code,
    )


def latencies(exchanges: Sequence[Exchange], changes: Sequence[Turnover]) -> dict[str, Latencies]:
    """Of all, of those during which some adapter changed, and of the others."""
    seconds = np.asarray([e.seconds for e in exchanges])
    sent = np.asarray([e.sent for e in exchanges])
    answered = np.asarray([e.answered for e in exchanges])
    meanwhile = np.zeros(len(exchanges), bool)
    for change in changes:
        meanwhile |= (sent <= change.acknowledged) & (change.sent <= answered)
    return {
        "all": Latencies.of(seconds),
        "while adapters changed": Latencies.of(seconds[meanwhile]),
        "otherwise": Latencies.of(seconds[~meanwhile]),
    }


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    return round(content, 6) if isinstance(content, float) else content
