"""Answers that gRPC has taken and that their clients do not read, within a limit.

gRPC keeps an answer until its client lets it be sent: for as long as the connection lasts, and as
many as there are calls. So large ones are counted until they are gone, as those over HTTP are.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hhdeploy.runtime.serving.errors import BusyError

_LOG = logging.getLogger("hhdeploy.serve.grpc")
# What is not counted; and from when on an answer that is not gone makes room where there is none.
SMALL_BYTES: Final = 1 << 16
SLOW_SECONDS: Final = 1.0


@dataclass(frozen=True)
class _Answer:
    peer: str
    size: int
    since: float


class Leaving:
    """The large answers of one server that are not gone yet. Belongs to one event loop."""

    def __init__(self, most: int, end: Callable[[str], None]) -> None:
        """``most``: bytes of them together. ``end``: ends the connection of a peer."""
        self._most, self._end = most, end
        self._numbers = itertools.count()
        self._there: dict[int, _Answer] = {}

    def add(self, peer: str, size: int) -> Callable[[], None]:
        """One more answer, of more than `SMALL_BYTES`; call what comes back once it is gone.

        Where they are too large together, the peer with the most of them loses its connection, of
        those that have had one for longer than `SLOW_SECONDS`.

        Raises:
            BusyError: there is no such peer, and no room.
        """
        while (held := sum(each.size for each in self._there.values())) + size > self._most:
            self._make_room(held)
        number = next(self._numbers)
        self._there[number] = _Answer(peer, size, time.monotonic())
        return lambda: self._gone(number)

    def _gone(self, number: int) -> None:
        self._there.pop(number, None)  # a peer's that lost its connection are counted no more

    def _make_room(self, held: int) -> None:
        begun = time.monotonic() - SLOW_SECONDS
        slow = {each.peer for each in self._there.values() if each.since < begun}
        if not slow:
            raise BusyError(
                f"the answers that clients have not taken yet are {held} bytes, at most "
                f"{self._most} are held. Try again later."
            )
        sizes: dict[str, int] = defaultdict(int)
        for each in self._there.values():
            sizes[each.peer] += each.size
        peer = max(slow, key=lambda one: sizes[one])
        _LOG.warning("answers not read: connection closed", extra={"peer": peer})
        self._there = {n: each for n, each in self._there.items() if each.peer != peer}
        self._end(peer)
