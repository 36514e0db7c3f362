"""Requests of all tasks to batches of one session.

    nothing runs              a request runs at once, with whatever else is there
    a batch runs, and the
    session takes no more     requests wait, and go together when it is done
    a batch runs, and the     requests wait for company: until a batch is full, or the first of
    session takes another     them has waited `max_wait`

Waiting requests go in order of priority (lower first), then of turn. A turn is when a request would
be done if all that wait got one image after the other in turn, n images counted as n ** 1.5: of one
size they go in order of arrival, and a small one never waits for many large ones (fair queueing,
each request a flow of its own). Large ones get less than an even share because little else goes
while one runs: clients of full batches, if they are many, would hold half of a session that small
requests need more of. Nor does a small one wait for the whole of a large one: while others wait, a
request that would hold the session for longer than `part_seconds` runs in parts, and whoever has
the earlier turn by then goes between. A session that is quicker than that splits nothing.

A request's place in the queue is its own from the moment it is taken, before its pictures are
decoded: one that will not be answered is refused before it costs anything.
Only where the queue is full, a request gives its place up to one that is much smaller.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hhdeploy.runtime.backends import Ids, Images, Run
from hhdeploy.runtime.serving.errors import BusyError, FailedError, RequestError, StoppingError
from hhdeploy.runtime.serving.processes.threads import start_threads

_LOG = logging.getLogger("hhdeploy.serve")
# Times of its own size that a request's turn lies ahead of one which gives its place up for it.
_MUCH = 4


@dataclass(frozen=True, eq=False)
class Computed:
    """Logits of one request, and where its time went.

    Attributes:
        logits: float32 [n, classes] of the graph.
        queue_seconds: that it waited, for its batch or between its parts.
        run_seconds: of its batch; of all that it was part of.
        batch: images of its batch; of the largest.
    """

    logits: NDArray[np.float32]
    queue_seconds: float
    run_seconds: float
    batch: int


@dataclass
class Place:
    """A request that was taken, see `Batcher.place`: its images, and how many of them wait."""

    count: int
    waiting: int


@dataclass(order=True)
class _Job:
    priority: int
    turn: float
    number: int
    place: Place = field(compare=False)
    images: Images = field(compare=False)
    rows: Ids | None = field(compare=False)
    done: Callable[[], None] = field(compare=False)
    answer: asyncio.Future[Computed] = field(compare=False)
    since: float = field(compare=False)
    logits: list[NDArray[np.float32]] = field(default_factory=list, compare=False)
    run_seconds: float = field(default=0.0, compare=False)
    batch: int = field(default=0, compare=False)


@dataclass(frozen=True)
class _Part:
    """Images of a job that go in one batch: all of them, or some in a row."""

    job: _Job
    images: Images
    rows: Ids | None
    last: bool

    @property
    def over(self) -> bool:
        """Whether nothing of the job is left to do."""
        return self.last or self.job.answer.done()


def _cost(images: int) -> float:
    """What a request costs those that wait: a large one holds the session for longer, too."""
    return float(images**1.5)


class Batcher:
    """The queue before one session. Its methods belong to one event loop.

    Attributes:
        queued: images that wait, those included that are not ready to run yet.
        pending: requests that wait.
        runs: batches that were run.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_batch: int,
        max_wait: float,
        max_queued: int,
        contexts: int = 1,
        part_seconds: float = 0.025,
    ) -> None:
        """Start ``contexts`` threads.

        Args:
            run: the session's; called with images [n, 3, H, W] and rows [n], or None if folded.
            max_batch: images of one batch.
            max_wait: seconds, see the module.
            max_queued: images that may wait.
            contexts: calls of ``run`` at the same time.
            part_seconds: one request holds the session for while others wait, about.
        """
        self.queued = 0
        self.pending = 0
        self.runs = 0
        self._run = run
        self._max_batch, self._max_wait, self._max_queued = max_batch, max_wait, max_queued
        self._contexts, self._part_seconds = contexts, part_seconds
        # Images that the session takes in that time, as far as its runs have shown.
        self._part = max_batch
        self._running: set[asyncio.Task[None]] = set()
        # A heap, and the images in it.
        self._ready: list[_Job] = []
        self._ready_images = 0
        self._numbers = itertools.count()
        # Images that each request has got since the start, had it waited all the time.
        self._clock = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._pool = start_threads(contexts, "hhdeploy-run")

    @contextmanager
    def place(self, count: int) -> Iterator[Place]:
        """A place in the queue for a request of ``count`` images, until the end of the block.

        Raises:
            RequestError: more images than one batch takes.
            BusyError: the queue is full.
            StoppingError: the server is shutting down.
        """
        if self._stopping:
            raise StoppingError("the server is shutting down.")
        if count > self._max_batch:
            raise RequestError(
                f"{count} images in one request: expected at most {self._max_batch} "
                "(the server's `max_batch`)."
            )
        if self.queued and self.queued + count > self._max_queued and not self._make_room(count):
            raise BusyError(
                f"{self.queued} images are waiting, at most {self._max_queued} may. Try again "
                "later, or send less at a time."
            )
        place = Place(count, count)
        self.queued += count
        self.pending += 1
        self._taken += 1
        self._idle.clear()
        try:
            yield place
        finally:
            self._leave_queue(place)
            self._taken -= 1
            if not self._taken:
                self._idle.set()

    async def run(
        self,
        place: Place,
        images: Images,
        rows: Ids | None,
        *,
        priority: int = 0,
        done: Callable[[], None] = lambda: None,
    ) -> Computed:
        """The logits of one request. Cancelling the call takes it out of the queue.

        Args:
            place: the request's, of as many images.
            images: float32 [n, 3, H, W].
            rows: int64 [n]; None if folded.
            priority: lower goes first.
            done: called once, when ``rows`` are read no more. After a call that was cancelled
                that may be later: a batch that runs goes on without its client.

        Raises:
            FailedError: the session failed.
            BusyError: the queue is full, and this request gave its place up.
        """
        job = _Job(
            priority,
            self._clock + _cost(place.count),
            next(self._numbers),
            place,
            images,
            rows,
            done,
            asyncio.get_running_loop().create_future(),
            time.perf_counter(),
        )
        self._add(job)
        self._start_what_may()
        try:
            return await job.answer
        except asyncio.CancelledError:
            if job in self._ready:
                self._remove(job)
                done()
            raise
        finally:
            del job  # the traceback of its answer's exception holds this frame

    async def drain(self) -> None:
        """Take nothing new, and wait until everything that was taken is answered."""
        self._stopping = True
        await self._idle.wait()
        while self._running:  # batches whose clients have left
            await asyncio.wait(self._running)
        self._pool.shutdown(wait=True)

    def _leave_queue(self, place: Place) -> None:
        if place.waiting:
            self.queued -= place.waiting
            self.pending -= 1
            place.waiting = 0

    def _add(self, job: _Job) -> None:
        heapq.heappush(self._ready, job)
        self._ready_images += job.place.waiting

    def _remove(self, job: _Job) -> None:
        self._ready.remove(job)
        heapq.heapify(self._ready)
        self._ready_images -= job.place.waiting

    def _make_room(self, count: int) -> bool:
        """Whether the last of those that wait made room for a request that is much smaller."""
        whole = (job for job in self._ready if job.place.waiting == job.place.count)
        last = max(whole, default=None)
        if (
            last is None
            or last.turn - self._clock <= _cost(_MUCH * count)
            or self.queued - last.place.count + count > self._max_queued
        ):
            return False
        self._remove(last)
        self._leave_queue(last.place)
        if not last.answer.done():
            last.answer.set_exception(
                BusyError("the queue is full, of smaller requests. Try again later.")
            )
        asyncio.get_running_loop().call_soon(last.done)
        return True

    def _start_what_may(self) -> None:
        while self._ready and len(self._running) < self._contexts:
            if self._running and self._ready_images < self._max_batch:
                left = min(j.since for j in self._ready) + self._max_wait - time.perf_counter()
                if left > 0:
                    if self._timer is None:
                        loop = asyncio.get_running_loop()
                        self._timer = loop.call_later(left, self._waited)
                    return
            self._running.add(asyncio.create_task(self._answer(self._take())))

    def _waited(self) -> None:
        self._timer = None
        self._start_what_may()

    def _take(self) -> list[_Part]:
        """The next batch."""
        batch: list[_Part] = []
        images = 0
        while self._ready:
            job = self._ready[0]
            count, most = job.place.waiting, self._max_batch
            if count > self._part and len(batch) + len(self._ready) > 1:
                count = most = self._part  # the first of its batch, or of the next
            if images + count > most:
                break
            batch.append(self._begin(heapq.heappop(self._ready), count))
            images += count
        self._clock += images / (len(batch) + len(self._ready))
        return batch

    def _begin(self, job: _Job, count: int) -> _Part:
        """The next ``count`` images of a job that was taken off the heap."""
        place = job.place
        self._ready_images -= place.waiting
        begin = place.count - place.waiting
        these, last = slice(begin, begin + count), count == place.waiting
        if last:
            self._leave_queue(place)
        else:
            self.queued -= count
            place.waiting -= count
        return _Part(job, job.images[these], None if job.rows is None else job.rows[these], last)

    async def _answer(self, batch: list[_Part]) -> None:
        loop = asyncio.get_running_loop()
        begin = time.perf_counter()
        try:
            logits = await loop.run_in_executor(self._pool, self._run_all, batch)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises, the request gets
            _LOG.exception("the session failed")
            for part in batch:
                if not part.job.answer.done():
                    # Without its cause, whose traceback holds this frame and with it the batch.
                    part.job.answer.set_exception(FailedError(f"the session failed: {error}"))
            return
        else:
            seconds = time.perf_counter() - begin
            self._observe(len(logits), seconds)
        finally:
            # The next batch first: the session does not wait until this one's answers are written.
            itself = asyncio.current_task()
            assert itself is not None
            self._running.discard(itself)
            for part in batch:
                if not part.over:
                    self._add(part.job)
            self._start_what_may()
            for part in batch:
                if part.over:
                    loop.call_soon(part.job.done)  # one that fails keeps no other from its rows
        self.runs += 1
        start = 0
        for part in batch:
            job, end = part.job, start + len(part.images)
            waited = begin - job.since - job.run_seconds
            job.logits.append(logits[start:end])
            job.run_seconds += seconds
            job.batch = max(job.batch, len(logits))
            if part.last and not job.answer.done():  # the client may have left
                found = job.logits[0] if len(job.logits) == 1 else np.concatenate(job.logits)
                job.answer.set_result(Computed(found, waited, job.run_seconds, job.batch))
            start = end

    def _observe(self, images: int, seconds: float) -> None:
        """A run shows how much one request may take, if it took too long or as much as it may."""
        if images >= self._part or seconds > self._part_seconds:
            takes = min(images * self._part_seconds / seconds, self._max_batch)
            self._part = max(1, int(takes))

    def _run_all(self, batch: list[_Part]) -> NDArray[np.float32]:
        """On a thread: megabytes of images are copied."""
        if len(batch) == 1:
            return self._run(batch[0].images, batch[0].rows)
        rows = [part.rows for part in batch if part.rows is not None]
        return self._run(
            np.concatenate([part.images for part in batch]), np.concatenate(rows) if rows else None
        )
