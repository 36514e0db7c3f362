"""Adapters are added, replaced, removed and loaded again while requests are answered."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hhdeploy.loadtest.client import Client, upload_body
from hhdeploy.loadtest.judge import Reply
from hhdeploy.loadtest.timeline import Timeline, Version
from hhdeploy.loadtest.variants import Task

ChangeKind = Literal["add", "replace", "remove", "load"]
# At most one adapter in so many is away at a time.
_AWAY = 8


@dataclass(frozen=True)
class Turnover:
    """One change; seconds of the requests' clock.

    Attributes:
        name: of the adapter.
        kind: ``add``: uploaded where there was none; ``replace``: another version uploaded under
            the same name; ``remove``: unloaded; ``load``: loaded again from the server's disk.
        sent, acknowledged: when.
        answer: of the server.
    """

    name: str
    kind: ChangeKind
    sent: float
    acknowledged: float
    answer: Reply

    @property
    def done(self) -> bool:
        """Whether the server did it."""
        return self.answer.status == 200


class Churn:
    """Changes of a fleet, at most one of an adapter at a time.

    Attributes:
        timelines: what each adapter was when, by task.
        changes: all that were answered, in that order.
    """

    def __init__(self, tasks: Sequence[Task], shares: NDArray[np.float64], seed: int) -> None:
        """``shares``: popularity of the tasks; half of the changes meet the popular ones."""
        self.timelines = [Timeline(0 if task.at_start else None) for task in tasks]
        self.changes: list[Turnover] = []
        self._tasks, self._shares = tasks, shares
        self._rng = np.random.default_rng([seed, 5])
        # What the server has on disk, also while it is unloaded.
        self._stored: list[Version] = [line.now for line in self.timelines]
        self._busy: set[int] = set()

    async def run(self, client: Client, per_second: float, stop: asyncio.Event) -> None:
        """Change at Poisson times until ``stop``; then wait for what was sent."""
        running: set[asyncio.Task[None]] = set()
        while not stop.is_set():
            try:
                await asyncio.wait_for(stop.wait(), self._rng.exponential(1 / per_second))
            except asyncio.TimeoutError:
                chosen = self._choose()
                if chosen is not None:
                    self._busy.add(chosen)
                    change = asyncio.create_task(self._change(client, chosen))
                    running.add(change)
                    change.add_done_callback(running.discard)
        await asyncio.gather(*running)

    def _choose(self) -> int | None:
        """An adapter with no change under way; None if there is none."""
        shares = self._shares if self._rng.random() < 0.5 else np.ones(len(self._shares))
        free = shares * [index not in self._busy for index in range(len(self._tasks))]
        if not free.any():
            return None
        return int(self._rng.choice(len(free), p=free / free.sum()))

    def _kind(self, task: int) -> ChangeKind:
        if self.timelines[task].now is None:
            known = self._stored[task] is not None
            return "load" if known and self._rng.random() < 0.5 else "add"
        away = sum(line.now is None for line in self.timelines)
        crowded = (away + 1) * _AWAY > len(self._tasks)
        return "replace" if crowded or self._rng.random() < 0.5 else "remove"

    async def _change(self, client: Client, task: int) -> None:
        kind, name = self._kind(task), self._tasks[task].name
        after = self._after(kind, task)
        if after is not None and kind != "load":
            body = upload_body(self._tasks[task].versions[after])
            sent = time.perf_counter()
            answer = await client.upload(name, body)
        else:
            sent = time.perf_counter()
            answer = await (client.load(name) if kind == "load" else client.unload(name))
        change = Turnover(name, kind, sent, time.perf_counter(), answer)
        self.changes.append(change)
        # After a change that failed either state may hold: it is a fault, and the last change.
        self.timelines[task].change(after, sent, change.acknowledged if change.done else math.inf)
        if change.done:
            self._busy.discard(task)
            if after is not None:
                self._stored[task] = after

    def _after(self, kind: ChangeKind, task: int) -> Version:
        if kind == "remove":
            return None
        stored = self._stored[task]
        if kind == "load":
            return stored
        others = [v for v in range(len(self._tasks[task].versions)) if v != stored]
        return int(self._rng.choice(others))
