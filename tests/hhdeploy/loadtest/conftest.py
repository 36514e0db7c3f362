"""What a server says of itself."""

from __future__ import annotations

import pytest

from hhdeploy.runtime.serving.metrics import Metrics, Now


def scraped(metrics: Metrics) -> str:
    """The text of a scrape: 2 batches were run and 5 adapters evicted."""
    now = Now(
        rows_used=3,
        rows=7,
        queued=0,
        pending=0,
        runs=2,
        evictions=5,
        load_failures=0,
        adapters=frozenset({"a", "b"}),
    )
    return metrics.exposition(now)[0].decode()


@pytest.fixture
def idle_scrape() -> str:
    """Of a server that has answered nothing yet."""
    return scraped(Metrics("bundle"))
