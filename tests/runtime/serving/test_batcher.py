"""The queue before a session, over a run that the test lets go when it likes."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from hhdeploy.runtime.serving.batcher import Batcher
from hhdeploy.runtime.serving.errors import (
    BusyError,
    FailedError,
    RequestError,
    StoppingError,
)

PIXELS = (3, 2, 2)
SOON = 30.0  # seconds, for a machine that is busy; nothing here is about time


@dataclass
class Gate:
    """A session whose runs wait to be let go; it answers twice the first pixel, and the row."""

    batches: list[list[int]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    failures: dict[int, Exception] = field(default_factory=dict)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    most: int = 0
    inside: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, images, rows):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            number = len(self.batches)
            self.batches.append([int(image[0, 0, 0]) for image in images])
            self.rows.append([] if rows is None else rows.tolist())
        assert self.go.acquire(timeout=SOON)
        with self.lock:
            self.inside -= 1
        if number in self.failures:
            raise self.failures[number]
        first = images[:, 0, 0, 0]
        return np.stack([2 * first, first if rows is None else rows.astype(np.float32)], 1)

    async def begun(self, count):
        """Wait until that many batches were begun."""
        await until(lambda: len(self.batches) >= count)


async def until(true):
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.001)


class Harness:
    def __init__(
        self, *, max_batch=4, max_wait=0.0, max_queued=100, contexts=1, part_seconds=math.inf
    ):
        self.gate = Gate()
        self.batcher = Batcher(
            self.gate.run,
            max_batch=max_batch,
            max_wait=max_wait,
            max_queued=max_queued,
            contexts=contexts,
            part_seconds=part_seconds,
        )
        self.taken, self.done = [], []

    async def ask(self, mark, count=1, priority=0):
        """A request of ``count`` images that all carry ``mark``, of row ``mark``."""
        images = np.full((count, *PIXELS), mark, np.float32)
        with self.batcher.place(count) as place:
            self.taken.append(mark)
            return await self.batcher.run(
                place,
                images,
                np.full(count, mark, np.int64),
                priority=priority,
                done=lambda: self.done.append(mark),
            )

    async def asking(self, *marks, **options):
        """Requests under way, in this order."""
        tasks = []
        for mark in marks:
            tasks.append(asyncio.create_task(self.ask(mark, **options)))
            await asyncio.sleep(0)
        return tasks

    def let_go(self, count=1):
        self.gate.go.release(count)

    async def end(self):
        self.let_go(100)
        await asyncio.wait_for(self.batcher.drain(), SOON)
        assert (self.batcher.queued, self.batcher.pending) == (0, 0)


def check(answer, mark, count=1):
    assert np.array_equal(answer.logits, np.full((count, 2), [2 * mark, mark], np.float32))


def play(scene, **options):
    """Run a scene with a harness of its own, and drain it."""

    async def body():
        harness = Harness(**options)
        try:
            await asyncio.wait_for(scene(harness), SOON)
        finally:
            await harness.end()

    asyncio.run(body())


# --- batches ------------------------------------------------------------------------------------


def test_an_idle_session_runs_at_once():
    """However long others would wait for company."""

    async def scene(harness):
        (first,) = await harness.asking(7)
        await harness.gate.begun(1)
        harness.let_go()
        answer = await first
        check(answer, 7)
        assert answer.batch == 1

    play(scene, max_wait=1e6)


def test_the_next_batch_begins_before_answers_are_written():
    """Else the session waits for whatever writes them."""

    async def scene(harness):
        async def waiting_once_answered():
            check(await harness.ask(1), 1)
            return harness.batcher.queued

        first = asyncio.create_task(waiting_once_answered())
        await harness.gate.begun(1)
        (second,) = await harness.asking(2)
        harness.let_go(2)
        assert await first == 0
        check(await second, 2)

    play(scene)


def test_what_comes_while_a_batch_runs_goes_together_when_it_is_done():
    async def scene(harness):
        first = await harness.asking(1)
        await harness.gate.begun(1)
        later = await harness.asking(2, 3, 4)
        assert (harness.batcher.queued, harness.batcher.pending) == (3, 3)
        assert harness.gate.batches == [[1]]
        harness.let_go(2)
        answers = await asyncio.gather(*first, *later)
        for answer, mark in zip(answers, (1, 2, 3, 4), strict=True):
            check(answer, mark)
        assert harness.gate.batches == [[1], [2, 3, 4]]
        assert harness.gate.rows == [[1], [2, 3, 4]]
        assert [a.batch for a in answers] == [1, 3, 3, 3]
        assert harness.batcher.runs == 2

    play(scene, max_wait=1e6)


def test_a_batch_is_never_larger_and_a_quick_request_never_split():
    async def scene(harness):
        first = await harness.asking(1)
        await harness.gate.begun(1)
        later = [
            *await harness.asking(2, count=3),
            *await harness.asking(3, count=2),
            *await harness.asking(4, count=1),
            *await harness.asking(5, count=4),
        ]
        harness.let_go(4)
        answers = await asyncio.gather(*first, *later)
        for answer, mark, count in zip(answers, (1, 2, 3, 4, 5), (1, 3, 2, 1, 4), strict=True):
            check(answer, mark, count)
        assert harness.gate.batches == [[1], [4, 3, 3], [2] * 3, [5] * 4]

    play(scene, max_batch=4)


def test_a_second_context_waits_for_company_until_the_batch_is_full():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(2, 3)
        await asyncio.sleep(0.01)
        assert harness.gate.batches == [[1]]
        tasks += await harness.asking(4)
        await harness.gate.begun(2)
        assert harness.gate.batches == [[1], [2, 3, 4]]
        assert harness.gate.most == 2
        harness.let_go(2)
        await asyncio.gather(*tasks)

    play(scene, max_batch=3, max_wait=1e6, contexts=2)


def test_a_second_context_waits_no_longer_than_max_wait():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(2)
        assert harness.gate.batches == [[1]]
        await harness.gate.begun(2)
        assert harness.gate.batches == [[1], [2]]
        harness.let_go(2)
        await asyncio.gather(*tasks)

    play(scene, max_wait=0.05, contexts=2)


def test_no_more_runs_at_the_same_time_than_contexts():
    async def scene(harness):
        tasks = await harness.asking(*range(8))
        await harness.gate.begun(2)
        harness.let_go(8)
        await asyncio.gather(*tasks)
        assert harness.gate.most == 2

    play(scene, max_batch=1, contexts=2)


def test_a_folded_session_gets_no_rows():
    async def scene(harness):
        harness.let_go()
        with harness.batcher.place(2) as place:
            answer = await harness.batcher.run(place, np.full((2, *PIXELS), 5, np.float32), None)
        assert answer.logits.tolist() == [[10, 5], [10, 5]]
        assert harness.gate.rows == [[]]

    play(scene)


def test_priorities_then_arrival():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(2, priority=2)
        tasks += await harness.asking(3, 4, priority=1)
        tasks += await harness.asking(5, priority=0)
        harness.let_go(5)
        await asyncio.gather(*tasks)
        assert harness.gate.batches == [[1], [5], [3], [4], [2]]

    play(scene, max_batch=1)


def test_a_small_request_does_not_wait_for_many_large_ones():
    async def scene(harness):
        tasks = await harness.asking(1, count=8)
        await harness.gate.begun(1)
        tasks += await harness.asking(*range(2, 9), count=8)
        harness.let_go(3)
        await harness.gate.begun(4)
        tasks += await harness.asking(99)
        harness.let_go(100)
        await asyncio.gather(*tasks)
        marks = [batch[0] for batch in harness.gate.batches]
        assert marks == [1, 2, 3, 4, 99, 5, 6, 7, 8]

    play(scene, max_batch=8)


def test_a_large_request_does_not_wait_for_small_ones_without_end():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(99, count=7)
        for mark in range(2, 61):  # there is always a small one
            tasks += await harness.asking(mark)
            harness.let_go()
            await harness.gate.begun(mark)
        harness.let_go(100)
        await asyncio.gather(*tasks)
        marks = [batch[0] for batch in harness.gate.batches]
        assert 7**1.5 <= marks.index(99) <= 2 * 7**1.5

    play(scene, max_batch=7)


def test_many_large_requests_leave_small_ones_most_of_a_session_that_they_fill():
    """Clients that ask again when they are answered: 8 of full batches, two batches of small."""

    async def scene(harness):
        tasks = await harness.asking(*range(1, 9), count=8)
        tasks += await harness.asking(*range(100, 116))
        mark, ran = 200, 0
        while ran < 60:
            harness.let_go()
            ran += 1
            await harness.gate.begun(ran + 1)
            large = harness.gate.batches[ran - 1][0] < 100
            tasks += await harness.asking(mark % 100 if large else mark, count=8 if large else 1)
            if not large:
                tasks += await harness.asking(*range(mark + 1, mark + 8))
            mark += 100
        harness.let_go(1000)
        await asyncio.gather(*tasks)
        large = sum(batch[0] < 100 for batch in harness.gate.batches[:60])
        assert 0 < large <= 60 // 3

    play(scene, max_batch=8, max_queued=200)


# --- requests in parts --------------------------------------------------------------------------

# Of a session that every run shows to be too slow, after the first: one image at a time.
SLOW = {"part_seconds": 0.0}


async def slow(harness):
    """What ran first, and is still to be let go."""
    tasks = await harness.asking(1)
    await harness.gate.begun(1)
    return tasks


def test_a_large_request_runs_in_parts_and_small_ones_go_between():
    async def scene(harness):
        tasks = await slow(harness)
        images = np.arange(20, 23, dtype=np.float32)[:, None, None, None] * np.ones(PIXELS)

        async def different():
            with harness.batcher.place(3) as place:
                return await harness.batcher.run(place, images, np.arange(30, 33))

        large = asyncio.create_task(different())
        await asyncio.sleep(0)
        tasks += await harness.asking(3, count=3)
        harness.let_go()
        await harness.gate.begun(2)
        tasks += await harness.asking(4)
        assert (harness.batcher.queued, harness.batcher.pending) == (6, 3)
        harness.let_go(100)
        await asyncio.gather(*tasks)
        answer = await large
        assert harness.gate.batches == [[1], [20], [4], [21], [22], [3, 3, 3]]  # 3 is alone then
        assert answer.logits.tolist() == [[40, 30], [42, 31], [44, 32]]
        assert answer.batch == 1
        assert answer.queue_seconds >= 0
        assert answer.run_seconds > 0

    play(scene, **SLOW)


def test_parts_of_large_requests_do_not_make_a_batch_that_is_as_long():
    async def scene(harness):
        tasks = await slow(harness)
        tasks += await harness.asking(2, 3, count=3)
        harness.let_go(100)
        await asyncio.gather(*tasks)
        assert harness.gate.batches == [[1], [2], [2], [2], [3, 3, 3]]  # 3 is alone then

    play(scene, **SLOW)


def test_a_session_that_is_quick_again_splits_no_more():
    async def scene(harness):
        tasks = await slow(harness)
        tasks += await harness.asking(2, 3, count=3)
        harness.let_go()
        await harness.gate.begun(2)
        harness.batcher._part_seconds = math.inf
        harness.let_go(100)
        await asyncio.gather(*tasks)
        assert harness.gate.batches == [[1], [2], [2, 2], [3, 3, 3]]

    play(scene, **SLOW)


@pytest.mark.parametrize("running", [True, False])
def test_a_request_that_is_cancelled_after_a_part_leaves_nothing(running):
    async def scene(harness):
        tasks = await slow(harness)
        (large,) = await harness.asking(2, count=3)
        tasks += await harness.asking(3, count=3)
        harness.let_go()
        await harness.gate.begun(2)  # its first part
        if not running:
            tasks += await harness.asking(4)
            harness.let_go()
            await harness.gate.begun(3)
        large.cancel()
        with pytest.raises(asyncio.CancelledError):
            await large
        assert (2 in harness.done) is not running
        harness.let_go(100)
        await asyncio.gather(*tasks)
        await until(lambda: sorted(harness.done) == sorted(harness.taken))
        between = [] if running else [[4]]
        assert harness.gate.batches == [[1], [2], *between, [3, 3, 3]]

    play(scene, **SLOW)


def test_a_part_that_fails_fails_its_request_and_the_rest_of_it_is_not_run():
    async def scene(harness):
        harness.gate.failures[1] = MemoryError("out of memory")
        tasks = await slow(harness)
        (large,) = await harness.asking(2, count=3)
        tasks += await harness.asking(3, count=3)
        harness.let_go(100)
        with pytest.raises(FailedError, match="out of memory"):
            await large
        for answer, mark, count in zip(await asyncio.gather(*tasks), (1, 3), (1, 3), strict=True):
            check(answer, mark, count)
        assert harness.gate.batches == [[1], [2], [3, 3, 3]]
        await until(lambda: sorted(harness.done) == [1, 2, 3])

    play(scene, **SLOW)


def test_a_request_that_was_begun_gives_its_place_to_nobody():
    async def scene(harness):
        tasks = await slow(harness)
        begun, waits = await harness.asking(2, 3, count=13)
        harness.let_go()
        await harness.gate.begun(2)
        tasks += await harness.asking(4)
        harness.let_go()
        await harness.gate.begun(3)
        tasks += await harness.asking(*range(5, 19))
        with pytest.raises(BusyError, match="of smaller requests"):
            await waits
        with pytest.raises(BusyError, match="26 images are waiting, at most 26 may"):
            await harness.ask(19)
        harness.let_go(100)
        await asyncio.gather(*tasks)
        check(await begun, 2, 13)

    play(scene, max_batch=13, max_queued=26, **SLOW)


# --- refusals -----------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_takes_again_when_there_is_room():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(2, count=2)
        with pytest.raises(BusyError, match="2 images are waiting, at most 3 may"):
            await harness.ask(3, count=2)
        tasks += await harness.asking(4)  # the third
        with pytest.raises(BusyError):
            await harness.ask(5)
        assert harness.batcher.queued == 3
        harness.let_go(2)
        await asyncio.gather(*tasks)
        assert harness.gate.batches == [[1], [4, 2, 2]]
        harness.let_go()
        check(await harness.ask(6), 6)

    play(scene, max_queued=3)


def test_in_a_full_queue_a_large_request_gives_its_place_to_a_small_one():
    async def scene(harness):
        tasks = await harness.asking(1, count=13)
        await harness.gate.begun(1)
        stays, leaves = await harness.asking(2, 3, count=13)
        with pytest.raises(BusyError, match="26 images are waiting"):  # 13 are not much more
            await harness.ask(4, count=4)
        tasks += await harness.asking(5, count=3)
        with pytest.raises(BusyError, match="of smaller requests"):
            await leaves
        assert harness.batcher.queued == 16
        await until(lambda: 3 in harness.done)
        harness.let_go(100)
        for answer, mark, count in zip(
            await asyncio.gather(*tasks, stays), (1, 5, 2), (13, 3, 13), strict=True
        ):
            check(answer, mark, count)

    play(scene, max_batch=13, max_queued=28)


def test_a_place_counts_before_its_images_are_ready():
    """Requests that wait for a picture to be decoded fill the queue as those that are ready do."""

    async def scene(harness):
        with harness.batcher.place(2):
            with pytest.raises(BusyError), harness.batcher.place(2):
                pass
            with harness.batcher.place(1):
                assert (harness.batcher.queued, harness.batcher.pending) == (3, 2)
        assert (harness.batcher.queued, harness.batcher.pending) == (0, 0)

    play(scene, max_queued=3)


def test_an_empty_queue_takes_a_request_of_any_allowed_size():
    async def scene(harness):
        harness.let_go()
        check(await harness.ask(1, count=4), 1, 4)

    play(scene, max_batch=4, max_queued=1)


def test_a_request_larger_than_a_batch():
    async def scene(harness):
        with pytest.raises(RequestError, match="5 images in one request: expected at most 4"):
            await harness.ask(1, count=5)

    play(scene, max_batch=4)


# --- clients that leave -------------------------------------------------------------------------


def test_a_request_that_is_cancelled_leaves_the_queue():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        left, stays = await harness.asking(2, 3)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert harness.batcher.queued == 1
        assert harness.done == [2]  # its rows are free at once
        harness.let_go(2)
        check(await stays, 3)
        assert harness.gate.batches == [[1], [3]]
        await asyncio.gather(*tasks)

    play(scene)


def test_a_request_that_is_cancelled_in_its_batch_keeps_its_rows_until_the_batch_is_done():
    """Else another adapter would be written into a row that the session is reading."""

    async def scene(harness):
        (first,) = await harness.asking(1)
        await harness.gate.begun(1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert harness.done == []
        (second,) = await harness.asking(2)
        harness.let_go(2)
        check(await second, 2)
        assert harness.done == [1, 2]

    play(scene)


def test_those_in_the_batch_of_one_that_left_get_their_own_answers():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(2, 3, 4)
        harness.let_go()
        await harness.gate.begun(2)
        tasks[2].cancel()
        harness.let_go()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[2], asyncio.CancelledError)
        for mark in (1, 2, 4):
            check(answers[mark - 1], mark)

    play(scene)


def test_a_deadline_takes_a_request_out():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(harness.ask(2), 0.01)
        harness.let_go()
        await asyncio.gather(*tasks)
        assert harness.gate.batches == [[1]]

    play(scene)


# --- failures -----------------------------------------------------------------------------------


def test_a_run_that_fails_fails_its_own_batch_alone():
    async def scene(harness):
        harness.gate.failures[0] = MemoryError("out of memory")
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(2, 3)
        harness.let_go(2)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[0], FailedError)
        assert "the session failed: out of memory" in str(answers[0])
        check(answers[1], 2)
        check(answers[2], 3)
        assert harness.batcher.runs == 1
        await until(lambda: sorted(harness.done) == [1, 2, 3])

    play(scene)


def test_images_that_do_not_go_together_fail_and_hang_nobody():
    """What joins them is part of the run: an error there reaches those who wait."""

    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(2)

        async def wrong():
            with harness.batcher.place(1) as place:
                return await harness.batcher.run(
                    place, np.zeros((1, 3, 5, 5), np.float32), np.zeros(1, np.int64)
                )

        tasks.append(asyncio.create_task(wrong()))
        await asyncio.sleep(0)
        harness.let_go(2)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        check(answers[0], 1)
        assert all(isinstance(a, FailedError) for a in answers[1:])

    play(scene)


def test_a_request_whose_rows_cannot_be_given_back_keeps_nobody_from_theirs():
    async def scene(harness):
        loop, reported = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda loop, context: reported.append(context["exception"]))
        tasks = await harness.asking(1)
        await harness.gate.begun(1)

        def fail():
            raise RuntimeError("the GPU is gone")

        async def bad():
            with harness.batcher.place(1) as place:
                images = np.full((1, *PIXELS), 2, np.float32)
                return await harness.batcher.run(place, images, np.full(1, 2, np.int64), done=fail)

        tasks.append(asyncio.create_task(bad()))
        await asyncio.sleep(0)
        tasks += await harness.asking(3)
        harness.let_go(2)
        answers = await asyncio.gather(*tasks)
        for answer, mark in zip(answers, (1, 2, 3), strict=True):
            check(answer, mark)
        await until(lambda: harness.done == [1, 3])
        assert [str(error) for error in reported] == ["the GPU is gone"]

    play(scene)


# --- the end ------------------------------------------------------------------------------------


def test_draining_answers_what_was_taken_and_takes_nothing_new():
    async def scene(harness):
        tasks = await harness.asking(1)
        await harness.gate.begun(1)
        tasks += await harness.asking(2, 3)
        decoding = harness.batcher.place(1)
        place = decoding.__enter__()  # taken, but not ready yet
        draining = asyncio.create_task(harness.batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            await harness.ask(9)
        harness.let_go(3)
        for answer, mark in zip(await asyncio.gather(*tasks), (1, 2, 3), strict=True):
            check(answer, mark)
        assert not draining.done()
        late = await harness.batcher.run(
            place, np.full((1, *PIXELS), 4, np.float32), np.full(1, 4, np.int64)
        )
        check(late, 4)
        assert not draining.done()
        decoding.__exit__(None, None, None)
        await draining

    play(scene, max_batch=2)


def test_draining_waits_for_a_batch_whose_clients_have_left():
    async def scene(harness):
        (left,) = await harness.asking(1)
        await harness.gate.begun(1)
        left.cancel()
        draining = asyncio.create_task(harness.batcher.drain())
        await asyncio.wait([left])
        await asyncio.sleep(0.01)
        assert not draining.done()
        harness.let_go()
        await draining
        assert harness.done == [1]

    play(scene)


def test_chaos():
    """Random sizes, priorities, departures, failures: every request ends, with its own answer."""
    random = np.random.default_rng(3)

    async def scene(harness):
        harness.gate.failures.update({i: RuntimeError("x") for i in range(5, 400, 17)})
        harness.gate.go.release(100_000)
        outcomes = {"answered": 0, "left": 0, "failed": 0, "busy": 0}

        async def one(mark):
            count = int(random.integers(1, 6))
            task = asyncio.create_task(harness.ask(mark, count, int(random.integers(3))))
            leaves = random.random() < 0.3
            for _ in range(int(random.integers(4))):
                await asyncio.sleep(0)
            if leaves:
                task.cancel()
            try:
                check(await task, mark, count)
                outcomes["answered"] += 1
            except asyncio.CancelledError:
                outcomes["left"] += 1
            except FailedError:
                outcomes["failed"] += 1
            except BusyError:
                outcomes["busy"] += 1

        for start in range(0, 600, 40):
            await asyncio.gather(*(one(start + i) for i in range(40)))
        assert sum(outcomes.values()) == 600
        assert min(outcomes.values()) > 0, outcomes
        assert all(len(batch) <= 8 for batch in harness.gate.batches)
        await until(lambda: len(harness.done) >= len(harness.taken))
        assert sorted(harness.done) == sorted(harness.taken)  # each exactly once

    play(scene, max_batch=8, max_queued=60, contexts=2, max_wait=0.0005)
