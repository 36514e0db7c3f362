"""Adapters by name: those in rows of the bank, and those on disk that can take a row.

One that is asked for and has no row is read, checked and packed on a thread, then put into a
free row; where none is free the adapter that was not used for longest gives its own up: new
requests for it wait until it is loaded again, those it has taken are answered first.

All methods belong to one event loop, and only `AdapterFiles` leaves it. The bank, what is known
and who waits change between two awaits only, so that they agree with each other at every await.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hhdeploy.adapters.checks import check_name
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.errors import HhdeployError, PlanError, WriteError
from hhdeploy.runtime.bank import AdapterBank, Hold, Packed
from hhdeploy.runtime.serving.errors import (
    FailedError,
    ForbiddenError,
    NotFoundError,
    RequestError,
)
from hhdeploy.runtime.serving.fleet.folders import AdapterFiles, Source, UnsettledError
from hhdeploy.runtime.serving.fleet.states import Counters, Known, State, Status, in_doubt

_LOG = logging.getLogger("hhdeploy.serve.fleet")
# A folder that is replaced by two renames is away for less than a millisecond in between.
_GAP_SECONDS = 0.5
_GAP_STEP_SECONDS = 0.02
_T = TypeVar("_T")


class Fleet:
    """The adapters of one open bundle."""

    def __init__(
        self,
        bundle: Bundle,
        bank: AdapterBank,
        directory: Path | None = None,
        pinned: frozenset[str] = frozenset(),
    ) -> None:
        """``bank``: holds the bundle's adapters, or as many as it has rows for."""
        self.counters = Counters()
        self._bank = bank
        self._files = AdapterFiles(bundle, bank, directory)
        self._writable = directory is not None
        self._pinned = pinned
        # An entry is replaced whenever something happens to its adapter, never changed.
        self._known = {name: Known(source) for name, source in self._files.bundled().items()}
        # What the last look could make nothing of: the next one may.
        self._doubts: dict[str, Source | None] = {}
        # When the adapters in the bank were asked for last.
        self._used = dict.fromkeys(bank, 0.0)
        self._row_freed = asyncio.Event()
        self._making_room = asyncio.Lock()
        self._gathering = asyncio.Lock()
        self._looking = asyncio.Lock()
        # Of the request that gathers several rows: they are not taken from it meanwhile.
        self._kept: frozenset[str | None] = frozenset()
        # Loads on behalf of requests, and the requests that wait for each.
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, list[asyncio.Future[Hold]]] = {}
        # Loads on behalf of operators.
        self._changes: set[asyncio.Task[AdapterEntry]] = set()
        self._reader = ThreadPoolExecutor(1, "hhdeploy-fleet")

    async def start(self) -> None:
        """Find the fleet directory's adapters, and load the pinned ones.

        Raises:
            PlanError: a pinned one is not there, or there are more of them than rows.
            HhdeployError: what is wrong with a pinned one.
        """
        await self.refresh()
        if self._doubts:
            await asyncio.sleep(_GAP_SECONDS)
            await self.refresh()
        for name in sorted(self._pinned - set(self._known)):
            known = ", ".join(sorted(self._known)) or "none"
            raise PlanError(f"--pin: unknown adapter {name!r}. There are: {known}.")
        if len(self._pinned) > self._bank.slots - 1:
            raise PlanError(
                f"--pin: {len(self._pinned)} adapters, the bank has {self._bank.slots - 1} rows "
                f"for them. Serve with --slots {len(self._pinned) + 1} or more."
            )
        for name in sorted(self._pinned):
            if name not in self._bank:
                await self.load(name)

    async def close(self) -> None:
        """Finish the loads that were begun, and stop the reading thread."""
        while begun := {*self._fetching.values(), *self._changes}:
            await asyncio.wait(begun)
        self._reader.shutdown(wait=True)

    # --- requests -------------------------------------------------------------------------------

    async def hold(self, names: Collection[str | None]) -> dict[str | None, Hold]:
        """The rows of one request, each to be given back with `release`. Loads what is missing.

        Args:
            names: of adapters, each once; None: the bare backbone.

        Raises:
            NotFoundError: no such adapter, or one that was unloaded.
            RequestError: one cannot be loaded; the backbone alone cannot answer; or there are
                more than the bank has rows for.
        """
        try:
            if not self._missing(names):
                return self._hold_all(names)
            self._check_room(names)
            if len(names) == 1:
                return {name: await self._come(name) for name in self._missing(names)}
            # One request at a time gathers several rows: two of them, each keeping what the
            # other waits for, would wait for ever.
            async with self._gathering:
                return await self._gather(names)
        except RequestError:
            raise
        except HhdeployError as error:
            raise RequestError(str(error)) from error

    def release(self, hold: Hold) -> None:
        """Give a row back."""
        self._bank.release(hold)
        self._row_freed.set()

    def _missing(self, names: Collection[str | None]) -> list[str]:
        return [name for name in names if name is not None and name not in self._bank]

    def _check_room(self, names: Collection[str | None]) -> None:
        room = self._bank.slots - 1 - len(self._pinned.difference(names))
        if len(set(names) - {None}) > room:
            raise RequestError(
                f"{len(names)} adapters at a time, the bank has room for {room} that are not "
                "pinned. Ask for fewer, or serve with more --slots."
            )

    async def _gather(self, names: Collection[str | None]) -> dict[str | None, Hold]:
        """Load one after the other, holding none meanwhile: what is replaced must drain."""
        self._kept = frozenset(names)
        try:
            while missing := self._missing(names):
                self.release(await self._come(missing[0]))
            return self._hold_all(names)
        finally:
            self._kept = frozenset()
            self._row_freed.set()

    def _hold_all(self, names: Collection[str | None]) -> dict[str | None, Hold]:
        held: dict[str | None, Hold] = {}
        try:
            for name in names:
                held[name] = self._held(name)
        except BaseException:
            for hold in held.values():
                self.release(hold)
            raise
        return held

    def _held(self, name: str | None) -> Hold:
        if name is not None:
            self._used[name] = time.monotonic()
        return self._bank.hold(name)

    async def _come(self, name: str) -> Hold:
        """The row of an adapter that has none yet."""
        known = self._find(name)
        if known.unloaded:
            raise NotFoundError(f"adapter {name!r} was unloaded. Load it again first.")
        if known.problem:
            raise RequestError(f"adapter {name!r} cannot be loaded: {known.problem}")
        # The row is handed over by whoever fills it: a request that only woke up to take it
        # might find that yet another adapter has it by then, again and again.
        coming: asyncio.Future[Hold] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append(coming)
        if name not in self._fetching:  # one load for all that wait, whoever of them leaves
            self._fetching[name] = asyncio.create_task(self._fetch(name))
        try:
            return await coming
        except asyncio.CancelledError:
            if coming.done() and not coming.cancelled() and coming.exception() is None:
                self.release(coming.result())
            raise

    async def _fetch(self, name: str) -> None:
        failure: Exception = NotFoundError(f"adapter {name!r} was removed meanwhile.")
        try:
            await self._bring(name)
        except Exception as error:  # noqa: BLE001 - handed to those who wait
            failure = error
        finally:
            del self._fetching[name]
            for coming in self._waiting.pop(name, ()):
                if not coming.done():
                    coming.set_exception(failure)

    # --- the operator ---------------------------------------------------------------------------

    async def load(self, name: str) -> AdapterEntry:
        """Read an adapter from its folder, also if it has a row already.

        Requests that were taken before get the old one; if it cannot be read, all do. A call
        that is cancelled is finished all the same.

        Raises:
            NotFoundError: no such folder.
            HhdeployError: what is wrong with it.
        """
        return await self._finish(self._load(name))

    async def _load(self, name: str) -> AdapterEntry:
        self._check_room({name})
        end = time.monotonic() + _GAP_SECONDS
        while True:
            source = await self._on_thread(self._files.find, name)
            known = self._known.get(name)
            away = known is not None and not known.source.bundled and in_doubt(known, source)
            if not away or time.monotonic() > end:
                break
            await asyncio.sleep(_GAP_STEP_SECONDS)
        if source is None:
            raise self._unknown(name)
        self._known[name] = Known(source)
        return await self._bring(name)

    async def upload(self, name: str, config: bytes, tensors: bytes) -> AdapterEntry:
        """Write an adapter into the fleet directory, checked before it is seen, and load it.

        A call that is cancelled is finished all the same.

        Raises:
            ForbiddenError: there is no fleet directory.
            FailedError: it cannot be written, e.g. the disk is full.
            HhdeployError: the name or the adapter is not acceptable; nothing is changed.
        """
        check_name(name)
        if not self._writable:
            raise ForbiddenError(
                "this server keeps no adapters of its own: it was started without --adapters-dir."
            )
        return await self._finish(self._upload(name, config, tensors))

    async def _upload(self, name: str, config: bytes, tensors: bytes) -> AdapterEntry:
        self._check_room({name})
        begin = time.perf_counter()
        try:
            source, packed = await self._on_thread(self._files.write, name, config, tensors)
        except WriteError as error:  # a full disk is not the request's fault
            raise FailedError(str(error)) from error
        self._known[name] = Known(source)
        return await self._place(packed, source, begin) or await self._bring(name)

    async def unload(self, name: str) -> None:
        """Answer no request for an adapter any more, until it is loaded again.

        Raises:
            NotFoundError: no such adapter.
            SessionError: the bank is baked into the graph.
        """
        known = self._find(name)
        self._remove(name)
        self._known[name] = replace(known, unloaded=True)

    def statuses(self) -> list[Status]:
        """Every adapter that the fleet can name, sorted."""
        return [self._status(name) for name in sorted(self._known)]

    def status(self, name: str) -> Status:
        """One adapter. Raises `NotFoundError` listing the names there are."""
        self._find(name)
        return self._status(name)

    @property
    def names(self) -> Collection[str]:
        """Every adapter that the fleet can name."""
        return self._known.keys()

    @property
    def rows(self) -> tuple[int, int]:
        """Rows in use, and rows there are for adapters."""
        return self._bank.slots - 1 - self._bank.free_rows, self._bank.slots - 1

    # --- the directory --------------------------------------------------------------------------

    async def watch(self, seconds: float) -> None:
        """`refresh` for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except Exception:  # noqa: BLE001 - e.g. a network file system that is away for a moment
                _LOG.exception("fleet directory cannot be looked through")

    async def refresh(self) -> None:
        """Look through the fleet directory: new, changed, removed and broken adapters.

        A changed one is loaded again if it has a row. A broken one is logged and skipped; if it
        replaced one that has a row, that one goes on answering. One whose folder or files are not
        there may be half way through a replacement: it stays what it was, and only when the next
        look finds the same it is gone or broken. What an operator changes while this looks is
        newer than what this found, and stays. One call at a time looks.

        Raises:
            OSError: the directory cannot be read; nothing is changed.
        """
        async with self._looking:
            before = dict(self._known)
            sources = await self._on_thread(self._files.sources)
            doubts, self._doubts = self._doubts, {}
            for name in sorted({*before, *sources}):
                known, found = before.get(name), sources.get(name)
                if self._known.get(name) is not known or (known and known.source == found):
                    continue
                sure = name in doubts and doubts[name] == found
                if not sure and in_doubt(known, found):
                    self._doubts[name] = found
                elif found is None:
                    del self._known[name]
                    self._remove(name)
                    _LOG.info("adapter gone", extra={"adapter": name})
                else:
                    await self._look_at(found, known, sure=sure)

    async def _look_at(self, found: Source, known: Known | None, *, sure: bool) -> None:
        """Take a source that a look found. ``sure``: the last look found it as well."""
        name, begin, problem = found.name, time.perf_counter(), ""
        packed = None
        try:
            packed = await self._on_thread(self._files.read, found)
        except HhdeployError as error:
            if isinstance(error, UnsettledError) and not sure:
                self._doubts[name] = found
                return
            problem = str(error)
        if self._known.get(name) is not known:
            return  # changed while it was read
        self._known[name] = Known(found, problem, known is not None and known.unloaded)
        if packed is None:
            self.counters.failures += 1
        elif name in self._bank:
            try:
                await self._place(packed, found, begin) or await self._bring(name)
            except HhdeployError as error:
                problem = str(error)
        if problem:
            _LOG.error("adapter not loaded", extra={"adapter": name, "problem": problem})
        else:
            _LOG.info("adapter found", extra={"adapter": name, "source": str(found.path)})

    # --- inside ---------------------------------------------------------------------------------

    def _find(self, name: str) -> Known:
        known = self._known.get(name)
        if known is None:
            raise self._unknown(name)
        return known

    def _unknown(self, name: str) -> NotFoundError:
        names = sorted(self._known)
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        return NotFoundError(f"unknown adapter {name[:200]!r}. There are: {shown or 'none'}.")

    def _status(self, name: str) -> Status:
        known = self._known[name]
        there = name in self._bank
        state: State = (
            "unloaded"
            if known.unloaded
            else "ready"
            if there
            else "broken"
            if known.problem
            else "on disk"
        )
        entry = self._bank[name] if there else None
        return Status(name, state, known.problem, name in self._pinned, entry)

    async def _on_thread(self, work: Callable[..., _T], *arguments: object) -> _T:
        """The result of blocking work. One thread: what is read first is put first."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, *arguments)

    async def _finish(self, change: Coroutine[object, object, AdapterEntry]) -> AdapterEntry:
        """The result of a change, which is not left half done when the caller leaves."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _bring(self, name: str) -> AdapterEntry:
        """Read an adapter and give it a row; an older one of its name answers until then."""
        begin = time.perf_counter()
        entry = None
        while entry is None:
            source, packed = await self._pack(name)
            entry = await self._place(packed, source, begin)
        return entry

    async def _pack(self, name: str) -> tuple[Source, Packed]:
        """Read an adapter from where it is known to be."""
        end = time.monotonic() + _GAP_SECONDS
        while True:
            source = self._find(name).source
            try:
                return source, await self._on_thread(self._files.read, source)
            except HhdeployError as error:
                if self._find(name).source != source:
                    continue
                unsettled = isinstance(error, UnsettledError)
                if unsettled and time.monotonic() < end:
                    await asyncio.sleep(_GAP_STEP_SECONDS)
                    continue
                self.counters.failures += 1
                if not unsettled:  # else for a look to judge
                    self._known[name] = replace(self._known[name], problem=str(error))
                raise

    async def _place(self, packed: Packed, source: Source, begin: float) -> AdapterEntry | None:
        """Give an adapter that was read from ``source`` a row, once one is free.

        None: by then another source is known of it, and an older adapter would undo a change.
        """
        name = packed.entry.name
        async with self._making_room:
            self._check_wanted(name)
            while not self._bank.free_rows:
                await self._make_room(name)
                self._check_wanted(name)
            if self._known[name].source != source:
                return None
            # On the loop: a copy of a megabyte. A lookup never sees the bank in between.
            entry = self._bank.put(packed, replace_existing=True)
            self._used[name] = time.monotonic()
            for coming in self._waiting.pop(name, ()):
                if not coming.done():
                    coming.set_result(self._held(name))
        seconds = time.perf_counter() - begin
        self.counters.loaded(seconds)
        _LOG.info("adapter loaded", extra={"adapter": name, "ms": round(1e3 * seconds, 3)})
        return entry

    def _check_wanted(self, name: str) -> None:
        known = self._known.get(name)
        if known is None or known.unloaded:
            raise NotFoundError(f"adapter {name!r} was unloaded or removed meanwhile.")

    async def _make_room(self, name: str) -> None:
        """Take a step towards a free row: evict an adapter, or wait for requests."""
        self._row_freed.clear()
        fixed = self._pinned | self._kept | {name}
        # Longest unused first; last those that could not be loaded again as they are.
        victims = sorted(
            (n for n in self._bank if n not in fixed),
            key=lambda n: (bool(self._known[n].problem), self._used[n]),
        )
        idle = [n for n in victims if not self._bank.held(n)]
        if idle:
            self._evict(idle[0], name)
            return
        if self._bank.slots - 1 > len(self._bank):
            pass  # a row is being given up: its requests are answered first
        elif victims:
            self._evict(victims[0], name)
        elif name in self._bank and name not in self._kept:
            self._evict(name, name)  # all others are pinned: it gives up its own row first
        # Else a request keeps the rows it gathered. It has them all, and is about to take them.
        if not self._bank.free_rows:
            await self._row_freed.wait()

    def _evict(self, victim: str, name: str) -> None:
        self._remove(victim)
        self.counters.evictions += 1
        _LOG.info("adapter evicted", extra={"adapter": victim, "for": name})

    def _remove(self, name: str) -> None:
        """Take an adapter out of the bank, if it is there; its row is freed when it is unused."""
        if name in self._bank:
            self._bank.remove(name)
            del self._used[name]
            self._row_freed.set()
