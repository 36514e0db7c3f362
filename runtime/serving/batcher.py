"""Requests of all tasks to batches of one session.

    nothing runs              a request runs at once, with whatever else is there
    a batch runs, and the
    session takes no more     requests wait, and go together when it is done
    a batch runs, and the     requests wait for company: until a batch is full, or the first of
    session takes another     them has waited `max_wait`

Waiting requests go in order of priority (lower first), then of arrival, and are never split.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hhdeploy.runtime.serving.errors import BusyError, FailedError, RequestError, StoppingError

Images = NDArray[np.float32]
Rows = NDArray[np.int64]
Run = Callable[[Images, Rows | None], NDArray[np.float32]]


@dataclass(frozen=True)
class Answer:
    """Logits of one request, and where its time went.

    Attributes:
        logits: float32 [n, classes] of the graph.
        queue_seconds: from `Batcher.run` to the start of its batch.
        run_seconds: of its batch.
        batch: images of its batch.
    """

    logits: NDArray[np.float32]
    queue_seconds: float
    run_seconds: float
    batch: int


@dataclass(order=True)
class _Job:
    priority: int
    number: int
    images: Images = field(compare=False)
    rows: Rows | None = field(compare=False)
    answer: asyncio.Future[Answer] = field(compare=False)
    since: float = field(compare=False)
    running: bool = field(default=False, compare=False)


class Batcher:
    """The queue before one session. Its methods belong to one event loop.

    Attributes:
        queued: images that wait.
        runs: batches that were run.
    """

    def __init__(
        self, run: Run, *, max_batch: int, max_wait: float, max_queued: int, contexts: int = 1
    ) -> None:
        """Start ``contexts`` threads.

        Args:
            run: the session's; called with images [n, 3, H, W] and rows [n], or None if folded.
            max_batch: images of one batch.
            max_wait: seconds, see the module.
            max_queued: images that may wait.
            contexts: calls of ``run`` at the same time.
        """
        self.queued = 0
        self.runs = 0
        self._run = run
        self._max_batch, self._max_wait, self._max_queued = max_batch, max_wait, max_queued
        self._contexts = contexts
        self._running: set[asyncio.Task[None]] = set()
        self._waiting: list[_Job] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._pool = ThreadPoolExecutor(contexts, "hhdeploy-run")

    async def run(self, images: Images, rows: Rows | None, priority: int = 0) -> Answer:
        """The logits of one request. Cancelling the call takes it out of the queue.

        Raises:
            RequestError: more images than one batch takes.
            BusyError: the queue is full.
            StoppingError: the server is shutting down.
            FailedError: the session failed.
        """
        count = len(images)
        if self._stopping:
            raise StoppingError("the server is shutting down.")
        if count > self._max_batch:
            raise RequestError(
                f"{count} images in one request: expected at most {self._max_batch} (--max-batch)."
            )
        if self._waiting and self.queued + count > self._max_queued:
            raise BusyError(
                f"{self.queued} images are waiting, at most {self._max_queued} may. Try again "
                "later, or send less at a time."
            )
        loop = asyncio.get_running_loop()
        job = _Job(
            priority, next(self._numbers), images, rows, loop.create_future(), time.perf_counter()
        )
        heapq.heappush(self._waiting, job)
        self.queued += count
        self._idle.clear()
        self._start_what_may()
        try:
            return await job.answer
        except asyncio.CancelledError:
            if not job.running:
                self._waiting.remove(job)
                heapq.heapify(self._waiting)
                self.queued -= count
                self._note_idle()
            raise

    async def drain(self) -> None:
        """Take nothing new, and wait until everything that was taken is answered."""
        self._stopping = True
        await self._idle.wait()
        self._pool.shutdown(wait=True)

    def _start_what_may(self) -> None:
        while self._waiting and len(self._running) < self._contexts:
            if self._running and self.queued < self._max_batch:
                left = min(j.since for j in self._waiting) + self._max_wait - time.perf_counter()
                if left > 0:
                    if self._timer is None:
                        loop = asyncio.get_running_loop()
                        self._timer = loop.call_later(left, self._waited)
                    return
            batch = self._take()
            task = asyncio.create_task(self._answer(batch))
            self._running.add(task)
            task.add_done_callback(self._ran)

    def _waited(self) -> None:
        self._timer = None
        self._start_what_may()

    def _take(self) -> list[_Job]:
        batch: list[_Job] = []
        room = self._max_batch
        while self._waiting and len(self._waiting[0].images) <= room:
            job = heapq.heappop(self._waiting)
            job.running = True
            room -= len(job.images)
            self.queued -= len(job.images)
            batch.append(job)
        return batch

    async def _answer(self, batch: list[_Job]) -> None:
        images = batch[0].images if len(batch) == 1 else np.concatenate([j.images for j in batch])
        rows = None if batch[0].rows is None else np.concatenate([j.rows for j in batch])  # type: ignore[arg-type]
        begin = time.perf_counter()
        try:
            logits = await asyncio.get_running_loop().run_in_executor(
                self._pool, self._run, images, rows
            )
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises, the request gets
            for job in batch:
                if not job.answer.done():
                    failure = FailedError(f"the session failed: {error}")
                    failure.__cause__ = error
                    job.answer.set_exception(failure)
            return
        self.runs += 1
        seconds, start = time.perf_counter() - begin, 0
        for job in batch:
            end = start + len(job.images)
            if not job.answer.done():  # the client may have left
                job.answer.set_result(
                    Answer(logits[start:end], begin - job.since, seconds, len(images))
                )
            start = end

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start_what_may()
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._waiting and not self._running:
            self._idle.set()
