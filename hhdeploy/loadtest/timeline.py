"""Which versions an adapter may have had while a request was under way.

A change takes effect at some moment between its sending and its acknowledgement. So a version
may answer from the moment when the change to it was sent, until the moment when the next change
was acknowledged: a request that was sent after the acknowledgement must not see the old version,
one that was answered before the sending must not see the new one, and between them either will do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# A version's number; None: there is no such adapter.
Version = int | None


@dataclass(frozen=True)
class Span:
    """A state and when it may have held, in seconds of one clock."""

    state: Version
    begin: float
    end: float


class Timeline:
    """The states of one adapter. Its changes do not overlap."""

    def __init__(self, state: Version) -> None:
        """``state``: at the start."""
        self._spans = [Span(state, -math.inf, math.inf)]

    @property
    def now(self) -> Version:
        """After the last change."""
        return self._spans[-1].state

    def change(self, state: Version, sent: float, acknowledged: float) -> None:
        """A change to ``state``, acknowledged at infinity if it never was."""
        last = self._spans[-1]
        self._spans[-1] = Span(last.state, last.begin, acknowledged)
        self._spans.append(Span(state, sent, math.inf))

    def possible(self, sent: float, answered: float) -> frozenset[Version]:
        """The states that a request may have seen."""
        return frozenset(s.state for s in self._spans if s.begin <= answered and sent <= s.end)
