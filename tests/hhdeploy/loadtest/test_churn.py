"""Which changes are made, what is remembered of them, and what happens if they fail."""

from __future__ import annotations

import asyncio
import json
import math

import numpy as np
import pytest

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.loadtest.churn import Churn
from hhdeploy.loadtest.judge import Reply
from hhdeploy.loadtest.variants import Task


class Registry:
    """A server's half of the changes: what it would answer with, by name; None: 404."""

    def __init__(self, tasks, status=200):
        self.disk = {t.name: 0 for t in tasks if t.at_start}
        self.there = dict(self.disk)
        self.status = status
        self.enough = asyncio.Event()
        self.seen = []

    async def _answer(self, name, change):
        assert name not in {n for n, _, done in self.seen if not done}, "two at a time"
        self.seen.append([name, change, False])
        mine = self.seen[-1]
        await asyncio.sleep(0)
        mine[2] = True
        if len(self.seen) >= 200:
            self.enough.set()
        return Reply(self.status)

    async def upload(self, name, body):
        version = json.loads(json.loads(body)["parameters"]["config"])["version"]
        self.disk[name] = self.there[name] = version
        return await self._answer(name, "upload")

    async def load(self, name):
        assert name in self.disk and name not in self.there
        self.there[name] = self.disk[name]
        return await self._answer(name, "load")

    async def unload(self, name):
        del self.there[name]
        return await self._answer(name, "unload")


@pytest.fixture
def tasks(tmp_path):
    found = []
    for index in range(16):
        versions = []
        for version in range(3):
            directory = tmp_path / str(index) / str(version)
            directory.mkdir(parents=True)
            (directory / CONFIG_FILE).write_text(json.dumps({"version": version}))
            (directory / TENSOR_FILE).write_bytes(b"tensors")
            versions.append(directory)
        found.append(Task(f"task{index}", tuple(versions), at_start=index % 8 != 7))
    return found


def churn_until_enough(tasks, registry):
    churn = Churn(tasks, np.full(len(tasks), 1 / len(tasks)), seed=0)

    async def run():
        await asyncio.wait_for(churn.run(registry, 20_000.0, registry.enough), 60)

    asyncio.run(run())
    return churn


def test_the_timelines_end_as_the_server_is(tasks):
    registry = Registry(tasks)
    churn = churn_until_enough(tasks, registry)
    assert len(churn.changes) == len(registry.seen) >= 200
    for task, line in zip(tasks, churn.timelines, strict=True):
        assert line.now == registry.there.get(task.name)
        assert line.possible(1e9, 2e9) == {line.now}
    assert {c.kind for c in churn.changes} == {"add", "replace", "remove", "load"}
    assert all(c.done and c.sent <= c.acknowledged for c in churn.changes)


def test_a_change_that_fails_leaves_both_states_possible_and_is_the_last(tasks):
    registry = Registry(tasks, status=500)
    churn = Churn(tasks, np.full(len(tasks), 1 / len(tasks)), seed=0)

    async def run():
        stop = asyncio.Event()
        running = asyncio.create_task(churn.run(registry, 20_000.0, stop))
        while len(churn.changes) < len(tasks):
            await asyncio.sleep(0)
        stop.set()
        await running

    asyncio.run(asyncio.wait_for(run(), 60))
    assert sorted(c.name for c in churn.changes) == sorted(t.name for t in tasks)
    assert not any(c.done for c in churn.changes)
    for task, line in zip(tasks, churn.timelines, strict=True):
        assert line.possible(math.inf, math.inf) == {0 if task.at_start else None, line.now}
