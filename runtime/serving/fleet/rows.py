"""Rows of the bank by adapter: who holds one, who waits for one, and who gives one up.

Where no row is free the adapter that was not used for longest gives its own up: new requests for
it wait until it is loaded again, those it has taken are answered first. What can be loaded, and
from where, is the fleet's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection

from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.errors import DeviceError, HhdeployError
from hhdeploy.runtime.bank import AdapterBank, Hold, Packed
from hhdeploy.runtime.serving.errors import LoadFailedError, RequestError

_LOG = logging.getLogger("hhdeploy.serve.fleet")


# One row of so many is for visitors, where none is free.
_VISITORS_SHARE = 8


class FleetRows:
    """The rows of one bank. All methods belong to one event loop.

    Visitors, who look around on the page, ask for every adapter there is. What only they ask for
    is the first to give its row up, and takes the rows of others only up to ``visitor_rows``.

    Attributes:
        evictions: adapters that lost their row to another one.
        visitor_rows: see above; also what one visitor's request may load.
    """

    def __init__(
        self,
        bank: AdapterBank,
        pinned: frozenset[str],
        fetch: Callable[[Collection[str | None]], Awaitable[dict[str | None, Hold]]],
        broken: Callable[[str], bool],
    ) -> None:
        """Rows of the adapters that the bank has.

        Args:
            bank: holds adapters already, or none.
            pinned: adapters that never give their row up.
            fetch: holds the rows of adapters that have none yet.
            broken: whether an adapter could not be loaded again as it is.
        """
        self.evictions = 0
        self._bank = bank
        self.visitor_rows = max(1, self.total // _VISITORS_SHARE)
        # Adapters that only visitors asked for since they were loaded.
        self._visited: set[str] = set()
        self._pinned = pinned
        self._fetch, self._broken = fetch, broken
        # When the adapters in the bank were asked for last.
        self._used = dict.fromkeys(bank, 0.0)
        # What was said of those that were loaded since.
        self._notes: dict[str, tuple[str, ...]] = {}
        # Requests that wait for an adapter's row.
        self._waiting: dict[str, list[asyncio.Future[Hold]]] = {}
        self._freed = asyncio.Event()
        self._making_room = asyncio.Lock()
        # Of the request that gathers several rows: they are not taken from it meanwhile.
        self._kept: frozenset[str | None] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self._bank

    @property
    def used(self) -> int:
        """Rows in use."""
        return self.total - self._bank.free_rows

    @property
    def total(self) -> int:
        """Rows there are for adapters."""
        return self._bank.slots - 1

    def entry(self, name: str) -> AdapterEntry | None:
        """Of an adapter that has a row."""
        if name not in self._bank:
            return None
        return self._bank[name]

    def notes(self, name: str) -> tuple[str, ...]:
        """What was said of an adapter when it got its row; of the bundle's it was said before."""
        return self._notes.get(name, ())

    async def hold(
        self, names: Collection[str | None], *, visitor: bool = False
    ) -> dict[str | None, Hold]:
        """The rows of one request, each to be given back with `release`. Loads what is missing.

        Args:
            names: of adapters, each once; None: the bare backbone.
            visitor: whether they are asked for by one.

        Raises:
            NotFoundError: no such adapter, or one that was unloaded.
            LoadFailedError: the device failed meanwhile.
            RequestError: one cannot be loaded; the backbone alone cannot answer; or there are
                more than the bank has rows for.
        """
        if visitor:
            self._visit(self.missing(names))
        elif self._visited:
            self._visited = {name for name in self._visited if name not in names}
        try:
            return await self._fetch(names) if self.missing(names) else self.hold_all(names)
        except RequestError:
            raise
        except DeviceError as error:
            raise LoadFailedError(f"an adapter could not be loaded: {error}") from error
        except HhdeployError as error:
            raise RequestError(str(error)) from error
        finally:
            if visitor:  # what did not come is forgotten: a client may name anything
                self._visited.difference_update(
                    [n for n in self.missing(names) if n not in self._waiting]
                )

    def _visit(self, missing: Collection[str]) -> None:
        if len(missing) > self.visitor_rows:
            raise RequestError(
                f"{len(missing)} adapters have no row, a visitor's request may load "
                f"{self.visitor_rows}. Ask for fewer at a time."
            )
        self._visited.update(missing)

    def release(self, hold: Hold) -> None:
        """Give a row back."""
        self._bank.release(hold)
        self._freed.set()

    def missing(self, names: Collection[str | None]) -> list[str]:
        """Those that have no row."""
        return [name for name in names if name is not None and name not in self._bank]

    def hold_all(self, names: Collection[str | None]) -> dict[str | None, Hold]:
        """The rows of adapters that all have one."""
        held: dict[str | None, Hold] = {}
        try:
            for name in names:
                held[name] = self._held(name)
        except BaseException:
            for hold in held.values():
                self.release(hold)
            raise
        return held

    def check_room(self, names: Collection[str | None]) -> None:
        """Raises `RequestError` for more adapters than there could be rows at a time."""
        room = self.total - len(self._pinned.difference(names))
        if len(set(names) - {None}) > room:
            raise RequestError(
                f"{len(names)} adapters at a time, the bank has room for {room} that are not "
                "pinned. Ask for fewer, or serve with more `slots`."
            )

    async def gather(
        self, names: Collection[str | None], come: Callable[[str], Awaitable[Hold]]
    ) -> dict[str | None, Hold]:
        """The rows of several adapters: one after the other, holding none meanwhile.

        What is replaced must drain. One call at a time.

        Args:
            names: of adapters, each once; None: the bare backbone.
            come: the row of one that has none yet.
        """
        self._kept = frozenset(names)
        try:
            while missing := self.missing(names):
                self.release(await come(missing[0]))
            return self.hold_all(names)
        finally:
            self._kept = frozenset()
            self._freed.set()

    async def wait(self, name: str) -> Hold:
        """The row of an adapter, as soon as `put` gives it one.

        Raises:
            Exception: what `give_up` says.
        """
        # The row is handed over by whoever fills it: a request that only woke up to take it
        # might find that yet another adapter has it by then, again and again.
        coming: asyncio.Future[Hold] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append(coming)
        try:
            return await coming
        except asyncio.CancelledError:
            if coming.done() and not coming.cancelled() and coming.exception() is None:
                self.release(coming.result())
            raise
        finally:
            del coming  # the traceback of its exception holds this frame

    def give_up(self, name: str, failure: Exception) -> None:
        """Tell those that wait for an adapter that it does not come."""
        for coming in self._waiting.pop(name, ()):
            if not coming.done():
                coming.set_exception(failure)

    async def put(self, packed: Packed, wanted: Callable[[], bool]) -> AdapterEntry | None:
        """Give an adapter a row, once one is free.

        Args:
            packed: what was read of it.
            wanted: raises if it is not any more; False: another version of it is, and this one
                would undo a change.
        """
        name = packed.entry.name
        async with self._making_room:
            wanted()
            while not self._bank.free_rows:
                await self._make_room(name)
                wanted()
            if not wanted():
                return None
            # On the loop: a copy of a megabyte. A lookup never sees the bank in between.
            entry = self._bank.put(packed, replace_existing=True)
            self._used[name] = time.monotonic()
            self._notes[name] = packed.notes
            for coming in self._waiting.pop(name, ()):
                if not coming.done():
                    coming.set_result(self._held(name))
        return entry

    def remove(self, name: str) -> None:
        """Take an adapter out of the bank, if it is there; its row is freed when it is unused."""
        if name in self._bank:
            self._bank.remove(name)
            del self._used[name]
            self._notes.pop(name, None)
            self._visited.discard(name)
            self._freed.set()

    def _held(self, name: str | None) -> Hold:
        if name is not None:
            self._used[name] = time.monotonic()
        return self._bank.hold(name)

    async def _make_room(self, name: str) -> None:
        """Take a step towards a free row: evict an adapter, or wait for requests."""
        self._freed.clear()
        fixed = self._pinned | self._kept | {name}
        visited = [n for n in self._bank if n in self._visited and n != name]
        full = name in self._visited and len(visited) >= self.visitor_rows
        # Visitors' first, then the longest unused; last those that could not be loaded again as
        # they are.
        victims = sorted(
            (n for n in self._bank if n not in fixed),
            key=lambda n: (self._broken(n), n not in self._visited, self._used[n]),
        )
        if full and (own := [n for n in victims if n in visited]):
            victims = own
        idle = [n for n in victims if not self._bank.held(n)]
        if idle:
            self._evict(idle[0], name)
            return
        if self.total > len(self._bank):
            pass  # a row is being given up: its requests are answered first
        elif victims:
            self._evict(victims[0], name)
        elif name in self._bank and name not in self._kept:
            self._evict(name, name)  # all others are pinned: it gives up its own row first
        # Else a request keeps the rows it gathered. It has them all, and is about to take them.
        if not self._bank.free_rows:
            await self._freed.wait()

    def _evict(self, victim: str, name: str) -> None:
        self.remove(victim)
        self.evictions += 1
        _LOG.info("adapter evicted", extra={"adapter": victim, "for": name})
