"""Requests and changes against one server at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import SessionError
from hhdeploy.loadtest.churn import Churn
from hhdeploy.loadtest.client import Client, Requests
from hhdeploy.loadtest.judge import Exchange
from hhdeploy.loadtest.scrape import Counts, read_counts
from hhdeploy.loadtest.traffic import Load, plan_requests
from hhdeploy.loadtest.variants import Task

_PROGRESS = 50
# A server that fails this often is asked no more: its time limits would make hours of it.
_MOST_FAILURES = 200
_SOUND = (200, 404)


@dataclass(frozen=True)
class Record:
    """What happened, not judged yet.

    Attributes:
        exchanges: in the order of the answers.
        churn: the changes, and what each adapter was when.
        seconds: of the whole.
        client_cpu_seconds: of this process.
        counts: what the server counted meanwhile; None: it does not answer any more.
        rss_at_start: bytes; None where the server's system does not tell.
    """

    exchanges: Sequence[Exchange]
    churn: Churn
    seconds: float
    client_cpu_seconds: float
    counts: Counts | None
    rss_at_start: float | None


async def drive(
    client: Client,
    load: Load,
    tasks: Sequence[Task],
    pool: NDArray[np.float32],
    shares: NDArray[np.float64],
    progress: Callable[[int, int], None],
) -> Record:
    """Send everything; every request has an exchange in the record, whatever became of it.

    Only a server that fails hundreds of times is not asked to the end.

    Args:
        client: of the server.
        load: how much is asked.
        tasks: the adapters.
        pool: float32 [pool, 3, H, W], the images that requests choose from.
        shares: popularity of the tasks.
        progress: called now and then with the number of requests done, and of all.
    """
    requests = plan_requests(load, shares, len(pool))
    bodies = Requests([task.name for task in tasks], pool, load.images)
    churn, stop = Churn(tasks, shares, load.seed), asyncio.Event()
    exchanges: list[Exchange] = []
    failures = 0
    before = read_counts(await client.metrics())
    cpu, begin = time.process_time(), time.perf_counter()
    changing = asyncio.create_task(_churn(churn, client, load.churn, stop))
    todo = iter(requests)  # shared: whoever is free takes the next

    async def worker() -> None:
        nonlocal failures
        for request in todo:
            if failures >= _MOST_FAILURES:
                return
            due = None if request.at is None else begin + request.at
            if due is not None:  # at once if it is late, which its latency shows
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            body, json_length = bodies.body(request.task, request.images)
            sent = time.perf_counter()
            answer = await client.infer(body, json_length)
            answered = time.perf_counter()
            exchanges.append(
                Exchange(request, sent if due is None else due, sent, answered, answer)
            )
            failures += answer.status not in _SOUND
            if len(exchanges) % _PROGRESS == 0:
                progress(len(exchanges), len(requests))

    await asyncio.gather(*(worker() for _ in range(load.clients)))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    stop.set()
    await changing
    progress(len(exchanges), len(requests))
    try:
        counts = read_counts(await client.metrics()).since(before)
    except SessionError:  # it died: the requests are lost, and the report says so
        counts = None
    return Record(exchanges, churn, seconds, cpu, counts, before.rss_bytes)


async def _churn(churn: Churn, client: Client, per_second: float, stop: asyncio.Event) -> None:
    if per_second:
        await churn.run(client, per_second, stop)
