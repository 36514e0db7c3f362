"""Adapters by name: those in rows of the bank, and those on disk that can take a row.

An adapter has a source, a directory: in the fleet directory (one adapter a folder) or in the
bundle. One that is asked for and has no row is read, checked and packed on a thread, then put
into a free row; where none is free the adapter that was not used for longest gives its own up:
new requests for it wait until it is loaded again, those it has taken are answered first.

All methods belong to one event loop, and only reading, checking and packing leave it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hhdeploy.adapter import CONFIG_FILE, TENSOR_FILE
from hhdeploy.bundle import AdapterEntry, Bundle
from hhdeploy.errors import AdapterError, HhdeployError, PlanError
from hhdeploy.files import atomic_directory
from hhdeploy.plan import check_name
from hhdeploy.runtime.bank import AdapterBank, Hold, Packed
from hhdeploy.runtime.serving.errors import ForbiddenError, NotFoundError, RequestError

_LOG = logging.getLogger("hhdeploy.serve.fleet")
# What a change of an adapter's files cannot leave as it was.
Stamp = tuple[tuple[int, int, int], ...]
State = Literal["ready", "on disk", "broken", "unloaded"]


@dataclass(frozen=True)
class Known:
    """An adapter that the fleet can name.

    Attributes:
        source: its directory.
        stamp: of the files, when they were last looked at.
        verified: from the bundle's manifest.
        problem: why it cannot be loaded; "" if nothing is known against it.
        unloaded: taken out by `Fleet.unload`, until it is loaded again.
    """

    source: Path
    stamp: Stamp
    verified: bool = False
    problem: str = ""
    unloaded: bool = False


@dataclass(frozen=True)
class Status:
    """What an operator wants to know of one adapter."""

    name: str
    state: State
    problem: str
    pinned: bool
    entry: AdapterEntry | None

    @property
    def answers(self) -> bool:
        """Whether requests may name it."""
        return self.state in ("ready", "on disk")


@dataclass
class Counters:
    """What happened since the start; ``load_seconds`` gets one value a load."""

    loads: int = 0
    failures: int = 0
    evictions: int = 0
    loaded: Callable[[float], None] = lambda seconds: None


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
        self._bundle = bundle
        self._bank = bank
        self._directory = directory
        self._pinned = pinned
        self._known: dict[str, Known] = {}
        self._used = dict.fromkeys(bank, 0.0)
        self._row_freed = asyncio.Event()
        self._changing = asyncio.Lock()
        self._gathering = asyncio.Lock()
        # Rows of the request that gathers several: never taken from it meanwhile.
        self._kept: set[str] = set()
        # Loads on behalf of requests, and the requests that wait for each.
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, list[asyncio.Future[Hold]]] = {}
        self._reader = ThreadPoolExecutor(1, "hhdeploy-fleet")
        for entry in bundle.manifest.adapters:
            source = bundle.path / "adapters" / entry.name
            self._known[entry.name] = Known(source, _stamp(source), entry.verified)
        for name in pinned - set(self._known) - set(self._found()):
            known = ", ".join(sorted({*self._known, *self._found()})) or "none"
            raise PlanError(f"--pin: unknown adapter {name!r}. There are: {known}.")

    async def start(self) -> None:
        """Find the fleet directory's adapters, and load the pinned ones."""
        await self.refresh()
        for name in sorted(self._pinned):
            if name not in self._bank:
                await self.load(name)

    # --- requests -------------------------------------------------------------------------------

    async def hold(self, names: Collection[str | None]) -> dict[str | None, Hold]:
        """The rows of one request, each to be given back with `release`. Loads what is missing.

        Args:
            names: of adapters; None: the bare backbone.

        Raises:
            NotFoundError: no such adapter, or one that was unloaded.
            RequestError: one cannot be loaded; the backbone alone cannot answer; or there are
                more than the bank has rows for.
        """
        try:
            missing = [n for n in names if n is not None and n not in self._bank]
            if not missing:
                return {name: self._held(name) for name in names}
            room = self._bank.slots - 1 - len(self._pinned - set(names))
            if len(set(names) - {None}) > room:
                raise RequestError(
                    f"{len(names)} adapters in one request, the bank has room for {room} that are "
                    "not pinned. Ask for fewer at a time."
                )
            # One request at a time gathers several rows: two of them, each holding what the
            # other waits for, would wait for ever. With one name nothing is held meanwhile.
            async with self._gathering if len(names) > 1 else nullcontext():
                return await self._gather(names)
        except RequestError:
            raise
        except HhdeployError as error:
            raise RequestError(str(error)) from error

    async def _gather(self, names: Collection[str | None]) -> dict[str | None, Hold]:
        held: dict[str | None, Hold] = {}
        try:
            for name in names:
                if name is None or name in self._bank:
                    held[name] = self._held(name)
                else:
                    held[name] = await self._come(name)
                if name is not None and len(names) > 1:
                    self._kept.add(name)
        except BaseException:
            for hold in held.values():
                self.release(hold)
            raise
        finally:
            self._kept.difference_update(held)
        return held

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
        del self._fetching[name]
        for coming in self._waiting.pop(name, ()):
            if not coming.done():
                coming.set_exception(failure)

    def _held(self, name: str | None) -> Hold:
        if name is not None:
            self._used[name] = time.monotonic()
        return self._bank.hold(name)

    def release(self, hold: Hold) -> None:
        """Give a row back."""
        self._bank.release(hold)
        self._row_freed.set()

    # --- the operator ---------------------------------------------------------------------------

    async def load(self, name: str) -> AdapterEntry:
        """Read an adapter from its directory, also if it has a row already.

        Requests that were taken before get the old one; if it cannot be read, all do.

        Raises:
            NotFoundError: no such directory.
            HhdeployError: what is wrong with it.
        """
        if name not in self._known:
            await self.refresh()
        known = self._find(name)
        self._known[name] = replace(known, unloaded=False, problem="", stamp=_stamp(known.source))
        await self._bring(name)
        return self._bank[name]

    async def unload(self, name: str) -> None:
        """Answer no request for an adapter any more, until it is loaded again.

        Raises:
            NotFoundError: no such adapter.
            PlanError: the bank is baked into the graph.
        """
        known = self._find(name)
        async with self._changing:
            if name in self._bank:
                self._bank.remove(name)
            self._row_freed.set()
            self._known[name] = replace(known, unloaded=True)

    async def upload(self, name: str, config: bytes, tensors: bytes) -> AdapterEntry:
        """Write an adapter into the fleet directory, checked before it is seen, and load it.

        Raises:
            ForbiddenError: there is no fleet directory.
            HhdeployError: the name or the adapter is not acceptable; nothing is changed.
        """
        check_name(name)
        directory = self._directory
        if directory is None:
            raise ForbiddenError(
                "this server keeps no adapters of its own: it was started without --adapters-dir."
            )
        await asyncio.get_running_loop().run_in_executor(
            self._reader, self._store, directory / name, name, config, tensors
        )
        self._known[name] = Known(directory / name, _stamp(directory / name))
        await self._bring(name)
        return self._bank[name]

    def statuses(self) -> list[Status]:
        """Every adapter that the fleet can name, sorted."""
        return [self._status(name) for name in sorted(self._known)]

    def status(self, name: str) -> Status:
        """One adapter. Raises `NotFoundError` listing the names there are."""
        self._find(name)
        return self._status(name)

    async def refresh(self) -> None:
        """Look through the fleet directory: new, changed, removed and broken adapters.

        A changed one is loaded again if it has a row. A broken one is logged and skipped; if it
        replaced one that has a row, that one goes on answering.
        """
        found = self._found()
        for name, source in found.items():
            known, stamp = self._known.get(name), _stamp(source)
            if known is not None and (known.source, known.stamp) == (source, stamp):
                continue
            fresh = Known(source, stamp, unloaded=known is not None and known.unloaded)
            self._known[name] = fresh
            try:
                check_name(name)
                if name in self._bank:
                    await self._bring(name)
                else:
                    await self._pack(name)
                _LOG.info("adapter found", extra={"adapter": name, "source": str(source)})
            except HhdeployError:
                pass  # logged, and kept as its problem
        gone = [
            name
            for name, known in self._known.items()
            if known.source.parent == self._directory and name not in found
        ]
        for name in gone:
            async with self._changing:
                del self._known[name]
                if name in self._bank:
                    self._bank.remove(name)
                    self._row_freed.set()
            _LOG.info("adapter gone", extra={"adapter": name})

    async def watch(self, seconds: float) -> None:
        """`refresh` for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except OSError as error:  # a network file system that is away for a moment
                _LOG.error("fleet directory cannot be read", extra={"problem": str(error)})

    def close(self) -> None:
        """Stop the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    @property
    def rows(self) -> tuple[int, int]:
        """Rows in use, and rows there are for adapters."""
        return self._bank.slots - 1 - self._bank.free_rows, self._bank.slots - 1

    # --- inside ---------------------------------------------------------------------------------

    def _find(self, name: str) -> Known:
        known = self._known.get(name)
        if known is None:
            names = sorted(self._known)
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
            raise NotFoundError(f"unknown adapter {name[:200]!r}. There are: {shown or 'none'}.")
        return known

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

    def _found(self) -> dict[str, Path]:
        """Adapter folders of the fleet directory; links that lead out of it are left out."""
        if self._directory is None:
            return {}
        root = self._directory.resolve()
        return {
            path.name: path
            for path in sorted(self._directory.iterdir())
            if not path.name.startswith(".")
            and path.is_dir()
            and path.resolve().is_relative_to(root)
        }

    async def _bring(self, name: str) -> None:
        """Read an adapter and give it a row; an older one of its name answers until then."""
        begin = time.perf_counter()
        packed = await self._pack(name)
        async with self._changing:
            if name not in self._known or self._known[name].unloaded:
                return
            await self._make_room(name)
            # On the loop: a copy of a megabyte. A lookup never sees the bank in between.
            self._bank.put(packed, replace_existing=True)
            self._used[name] = time.monotonic()
            for coming in self._waiting.pop(name, ()):
                if not coming.done():
                    coming.set_result(self._held(name))
            self._row_freed.set()
        self.counters.loads += 1
        self.counters.loaded(time.perf_counter() - begin)
        _LOG.info(
            "adapter loaded",
            extra={"adapter": name, "ms": round(1e3 * (time.perf_counter() - begin), 3)},
        )

    async def _pack(self, name: str) -> Packed:
        known = self._known[name]
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._reader, self._read, name, known
            )
        except HhdeployError as error:
            self.counters.failures += 1
            if name in self._known:
                self._known[name] = replace(self._known[name], problem=str(error))
            _LOG.error("adapter broken", extra={"adapter": name, "problem": str(error)})
            raise

    def _read(self, name: str, known: Known) -> Packed:
        if known.source.parent == self._bundle.path / "adapters":
            for file in (CONFIG_FILE, TENSOR_FILE):
                self._bundle.file(f"adapters/{name}/{file}")
        return self._bank.pack(name, known.source, verified=known.verified)

    async def _make_room(self, name: str) -> None:
        """A free row: the least recently used adapter's, once its requests are answered."""
        while not self._bank.free_rows:
            self._row_freed.clear()
            fixed = self._pinned | self._kept | {name}
            # Those that nobody holds first: their rows are free at once.
            victims = sorted(
                (n for n in self._bank if n not in fixed),
                key=lambda n: (self._bank.held(n), self._used[n]),
            )
            if self._bank.slots - 1 > len(self._bank):
                pass  # a row is being given up: its requests are answered first
            elif victims:
                self._evict(victims[0], name)
            elif name in self._bank and name not in self._kept:
                self._evict(name, name)  # all others are pinned: it gives up its own row first
            elif not self._kept:
                raise PlanError(
                    f"adapter {name!r}: all {self._bank.slots - 1} rows are taken by pinned "
                    f"adapters. Serve with --slots {self._bank.slots + 1} or more."
                )
            if not self._bank.free_rows:
                await self._row_freed.wait()

    def _evict(self, victim: str, name: str) -> None:
        self._bank.remove(victim)
        self.counters.evictions += 1
        _LOG.info("adapter evicted", extra={"adapter": victim, "for": name})

    def _store(self, target: Path, name: str, config: bytes, tensors: bytes) -> None:
        with atomic_directory(target, overwrite=True) as scratch:
            (scratch / CONFIG_FILE).write_bytes(config)
            (scratch / TENSOR_FILE).write_bytes(tensors)
            try:
                self._bank.pack(name, scratch)
            except HhdeployError as error:
                # Not the scratch directory's name, which is gone when somebody reads it.
                raise AdapterError(str(error).replace(str(scratch), name)) from error


def _stamp(directory: Path) -> Stamp:
    stamps = []
    for file in (CONFIG_FILE, TENSOR_FILE):
        try:
            found = (directory / file).stat()
        except OSError:
            stamps.append((0, 0, 0))
        else:
            stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(stamps)
