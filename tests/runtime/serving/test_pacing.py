"""What is costly is made seldom, and nobody gets what was made before they asked."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from hhdeploy.runtime.serving import pacing
from hhdeploy.runtime.serving.pacing import Paced


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by the work and by the waiting alone; starts at 1000 s."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock, sleep = Clock(), asyncio.sleep

    async def slept(seconds):
        clock.now += seconds
        await sleep(0)

    monkeypatch.setattr(pacing, "time", clock)
    monkeypatch.setattr(pacing.asyncio, "sleep", slept)
    return clock


def test_it_takes_a_tenth_of_the_time(clock):
    numbers = itertools.count()

    def make():
        clock.now += 0.003
        return next(numbers)

    async def ask():
        paced = Paced(make)
        return [await paced() for _ in range(11)]

    assert asyncio.run(ask()) == list(range(11)), "each was made after it was asked for"
    assert clock.now - 1000 == pytest.approx(11 * 0.003 + 10 * 0.027)


def test_who_waits_at_the_same_time_gets_the_same(clock):
    numbers = itertools.count()

    async def ask():
        paced = Paced(lambda: next(numbers))
        first = await asyncio.gather(*(paced() for _ in range(7)))
        return [*first, await paced()]

    assert asyncio.run(ask()) == [0] * 7 + [1]


def test_one_that_leaves_ends_nobody_s_wait_and_an_error_is_everybody_s(clock):
    async def ask():
        paced = Paced(lambda: 1 // 0)
        leaves, stays = asyncio.create_task(paced()), asyncio.create_task(paced())
        await asyncio.sleep(0)
        leaves.cancel()
        found = await asyncio.gather(leaves, stays, return_exceptions=True)
        return [type(each) for each in found]

    assert asyncio.run(ask()) == [asyncio.CancelledError, ZeroDivisionError]
