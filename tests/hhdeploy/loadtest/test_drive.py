"""Requests are paced, shared among the clients, and given up with a server that always fails."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from hhdeploy.loadtest.drive import drive
from hhdeploy.loadtest.judge import Reply
from hhdeploy.loadtest.traffic import Load
from hhdeploy.loadtest.variants import Task

TASKS = [Task("alpha", (), True), Task("beta", (), True)]
POOL = np.zeros((3, 3, 2, 2), np.float32)


class Double:
    """A client whose server answers at once; counts how many ask at the same time."""

    def __init__(self, scrape: str, status: int = 200) -> None:
        self.scrape, self.status = scrape, status
        self.asking = self.most = 0

    async def metrics(self) -> str:
        return self.scrape

    async def infer(self, body: bytes, json_length: int) -> Reply:
        self.asking += 1
        self.most = max(self.most, self.asking)
        await asyncio.sleep(0)
        self.asking -= 1
        return Reply(self.status)


def run(client, load):
    done = []
    shares = np.full(2, 0.5)
    work = drive(client, load, TASKS, POOL, shares, lambda *progress: done.append(progress))
    record = asyncio.run(work)
    assert done[-1] == (len(record.exchanges), load.requests)
    return record


def test_a_closed_loop_sends_all_from_as_many_clients(idle_scrape):
    client = Double(idle_scrape)
    record = run(client, Load(500, clients=7))
    assert len(record.exchanges) == 500
    assert client.most == 7
    assert all(e.due == e.sent <= e.answered for e in record.exchanges)


def test_an_open_loop_sends_nothing_before_it_is_due(idle_scrape):
    record = run(Double(idle_scrape), Load(100, clients=3, rate=2000.0))
    assert len(record.exchanges) == 100
    assert all(e.due <= e.sent <= e.answered for e in record.exchanges)
    planned = sorted(e.request.at for e in record.exchanges)
    dues = sorted(e.due for e in record.exchanges)
    assert np.diff(dues) == pytest.approx(np.diff(planned), abs=1e-6)


def test_refusals_of_adapters_that_are_away_are_asked_to_the_end(idle_scrape):
    assert len(run(Double(idle_scrape, 404), Load(1000)).exchanges) == 1000


def test_a_server_that_always_fails_is_not_asked_to_the_end(idle_scrape):
    record = run(Double(idle_scrape, 500), Load(1000, clients=4))
    assert 200 <= len(record.exchanges) < 210
