"""Adapters by name: those in rows of the bank, and those on disk that can take a row.

One that is asked for and has no row is read, checked and packed on a thread, then put into a
row; `rows` says which.

All methods belong to one event loop, and only `AdapterFiles` leaves it. The bank, what is known
and who waits change between two awaits only, so that they agree with each other at every await.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hhdeploy.adapters.checks import check_name
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.errors import HhdeployError, OccupiedError, PlanError, WriteError, abbreviate
from hhdeploy.runtime.bank import AdapterBank, Hold, Packed
from hhdeploy.runtime.serving.errors import (
    FailedError,
    ForbiddenError,
    LoadFailedError,
    NotFoundError,
    RequestError,
)
from hhdeploy.runtime.serving.fleet.folders import AdapterFiles, Source, UnsettledError
from hhdeploy.runtime.serving.fleet.rows import FleetRows
from hhdeploy.runtime.serving.fleet.states import Counters, Known, Status, in_doubt
from hhdeploy.runtime.serving.processes.threads import start_threads

_LOG = logging.getLogger("hhdeploy.serve.fleet")
# A folder that is replaced by two renames is away for less than a millisecond in between.
_GAP_SECONDS = 0.5
_GAP_STEP_SECONDS = 0.02
_T = TypeVar("_T")


class Fleet:
    """The adapters of one open bundle.

    Attributes:
        rows: where requests hold them.
        counters: what happened since the start.
    """

    def __init__(
        self,
        bundle: Bundle,
        bank: AdapterBank,
        directory: Path | None = None,
        pinned: frozenset[str] = frozenset(),
    ) -> None:
        """``bank``: holds the bundle's adapters, or as many as it has rows for."""
        self.counters = Counters()
        self.rows = FleetRows(bank, pinned, self._fetch_rows, self._is_broken)
        self._files = AdapterFiles(bundle, bank, directory)
        self._writable = directory is not None
        self._pinned = pinned
        # An entry is replaced whenever something happens to its adapter, never changed.
        self._known = {name: Known(source) for name, source in self._files.bundled().items()}
        # What the last look could make nothing of: the next one may.
        self._doubts: dict[str, Source | None] = {}
        self._gathering = asyncio.Lock()
        self._looking = asyncio.Lock()
        # Loads on behalf of requests.
        self._fetching: dict[str, asyncio.Task[None]] = {}
        # Loads on behalf of operators.
        self._changes: set[asyncio.Task[AdapterEntry]] = set()
        self._reader = start_threads(1, "hhdeploy-fleet")

    def reserve(self, name: str) -> None:
        """Take no folder of this name: it is the bundle's in the protocol.

        Raises:
            PlanError: an adapter of the bundle's own has it.
        """
        if name in self._known:
            raise PlanError(
                f"{name!r} is an adapter and the bundle's name in the protocol: requests could not "
                "tell them apart. Choose another `model_name`."
            )
        self._files.reserved = name

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
            known = abbreviate(sorted(self._known), 20) or "none"
            raise PlanError(f"`pinned`: unknown adapter {name!r}. There are: {known}.")
        if len(self._pinned) > self.rows.total:
            raise PlanError(
                f"`pinned`: {len(self._pinned)} adapters, the bank has {self.rows.total} rows "
                f"for them. Serve with `slots={len(self._pinned) + 1}` or more."
            )
        for name in sorted(self._pinned):
            if name not in self.rows:
                await self.load(name)

    async def close(self) -> None:
        """Finish the loads that were begun, and stop the reading thread."""
        while begun := {*self._fetching.values(), *self._changes}:
            await asyncio.wait(begun)
        self._reader.shutdown(wait=True)

    # --- requests -------------------------------------------------------------------------------

    async def _fetch_rows(self, names: Collection[str | None]) -> dict[str | None, Hold]:
        """The rows of one request, of which some have to be loaded; see `FleetRows.hold`."""
        missing = self.rows.missing(names)
        for name in missing:  # before any of them takes another one's row
            self.status(name).check(to_load=True)
        self.rows.check_room(names)
        if len(names) == 1:
            return {name: await self._come(name) for name in missing}
        # One request at a time gathers several rows: two of them, each keeping what the other
        # waits for, would wait for ever.
        async with self._gathering:
            return await self.rows.gather(names, self._come)

    async def _come(self, name: str) -> Hold:
        """The row of an adapter that has none yet."""
        self.status(name).check(to_load=True)
        if name not in self._fetching:  # one load for all that wait, whoever of them leaves
            self._fetching[name] = asyncio.create_task(self._fetch(name))
        return await self.rows.wait(name)

    async def _fetch(self, name: str) -> None:
        try:
            await self._bring(name)
        except Exception as error:  # noqa: BLE001 - handed to those who wait
            self.rows.give_up(name, error)
        finally:
            del self._fetching[name]
            self.rows.give_up(name, NotFoundError(f"adapter {name!r} was removed meanwhile."))

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
        self.rows.check_room({name})
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
            RequestError: its folder is there, and is not one that an upload replaces.
            HhdeployError: the name or the adapter is not acceptable; nothing is changed.
        """
        check_name(name)
        if not self._writable:
            raise ForbiddenError(
                "this server keeps no adapters of its own: it was started without `adapters_dir`."
            )
        return await self._finish(self._upload(name, config, tensors))

    async def _upload(self, name: str, config: bytes, tensors: bytes) -> AdapterEntry:
        self.rows.check_room({name})
        begin = time.perf_counter()
        try:
            source, packed = await self._on_thread(self._files.write, name, config, tensors)
        except OccupiedError as error:
            raise RequestError(
                f"the folder {name!r} of the fleet directory is in the way: {error.reason}. An "
                "upload replaces nothing but an adapter that can be read and has no other files. "
                "Upload it under another name, or have the operator move that folder away."
            ) from error
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
        self.rows.remove(name)
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

    # --- the directory --------------------------------------------------------------------------

    async def watch(self, seconds: float) -> None:
        """`look` for ever."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def look(self) -> None:
        """`refresh`, of which a failure is a line of the log."""
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
                    self.rows.remove(name)
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
            unsettled = isinstance(error, UnsettledError) and not sure
            if unsettled or isinstance(error, LoadFailedError):  # the next look may read it
                self._doubts[name] = found
                return
            problem = str(error)
        if self._known.get(name) is not known:
            return  # changed while it was read
        self._known[name] = Known(found, problem, known is not None and known.unloaded)
        if packed is None:
            self.counters.failures += 1
        elif name in self.rows:
            try:
                await self._place(packed, found, begin) or await self._bring(name)
            except HhdeployError as error:
                problem = str(error)
        if packed is None or problem:
            _LOG.error("adapter not loaded", extra={"adapter": name, "problem": problem})
        else:
            _LOG.info("adapter found", extra={**packed.said, "source": str(found.path)})

    # --- inside ---------------------------------------------------------------------------------

    def _find(self, name: str) -> Known:
        known = self._known.get(name)
        if known is None:
            raise self._unknown(name)
        return known

    def _unknown(self, name: str) -> NotFoundError:
        names = sorted(self._known.keys() - {name})  # whose folder may be gone
        shown = abbreviate(names, 20)
        bundle = f"; the bundle is {self._files.reserved!r}" if self._files.reserved else ""
        return NotFoundError(
            f"unknown adapter {name[:200]!r}. There are: {shown or 'none'}{bundle}."
        )

    def _status(self, name: str) -> Status:
        known, entry = self._known[name], self.rows.entry(name)
        state, read = known.state(entry is not None), self._files.entries.get(name)
        pinned, bundled = name in self._pinned, known.source.bundled
        return Status(name, state, known.problem, pinned, entry, read, bundled)

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
                if not unsettled and not isinstance(error, LoadFailedError):  # which passes
                    self._known[name] = replace(self._known[name], problem=str(error))
                raise

    async def _place(self, packed: Packed, source: Source, begin: float) -> AdapterEntry | None:
        """Give an adapter that was read from ``source`` a row, once one is free.

        None: by then another source is known of it, and an older adapter would undo a change.
        """
        name = packed.entry.name
        entry = await self.rows.put(packed, lambda: self._wanted(name) == source)
        if entry is not None:
            if self._known[name].problem:
                self._known[name] = replace(self._known[name], problem="")
            seconds = time.perf_counter() - begin
            self.counters.loaded(seconds)
            _LOG.info("adapter loaded", extra={**packed.said, "ms": round(1e3 * seconds, 3)})
        return entry

    def _wanted(self, name: str) -> Source:
        """Where an adapter is to be read from; raises if it is not wanted any more."""
        known = self._known.get(name)
        if known is None or known.unloaded:
            raise NotFoundError(f"adapter {name!r} was unloaded or removed meanwhile.")
        return known.source

    def _is_broken(self, name: str) -> bool:
        return bool(self._known[name].problem)
