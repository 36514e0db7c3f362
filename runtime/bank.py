"""The bank of an open session: names to rows, changed while requests are in flight.

A row is written only while nobody can see it: a new adapter gets a free row, and the name
points to it once the row is complete. A removed or replaced adapter's row is cleared when the
last request that holds it is done, and free once it is zeros. So a request sees the old or the
new adapter, never a mixture. A backend with a copy of the bank is told of every row that was
written. Whoever writes holds the row meanwhile, and not the lock: requests do not wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.format import Adapter, checked_adapter, load_adapter
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.bundle.membership import admit, entry_of, unseen
from hhdeploy.bundle.store import Progress
from hhdeploy.choices import Precision, listener, whole
from hhdeploy.errors import CapacityError, DeviceError, SessionError, abbreviate
from hhdeploy.runtime.backends import closed

BACKBONE_ROW = 0
DEFAULT_SLOTS = 64


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter that was read, checked and packed, and has no row yet.

    Attributes:
        entry: what it is.
        row: its values.
        notes: what is assumed of it, and what graphs make no use of; see `admit`.
    """

    entry: AdapterEntry
    row: NDArray[np.float32]
    notes: tuple[str, ...] = ()

    @property
    def said(self) -> dict[str, object]:
        """What a log says of it."""
        return {
            "adapter": self.entry.name,
            "verified": self.entry.verified,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class Hold:
    """A row that a request uses: it keeps its values until `AdapterBank.release`. Each is one of
    its own, though others hold the same row.

    Attributes:
        row: its number.
        entry: of its adapter; None: the bare backbone.
    """

    row: int
    entry: AdapterEntry | None


class AdapterBank:
    """Adapters of an open session by name; ``len``, ``in`` and iteration give the names.

    Attributes:
        rows: float32 [slots, row], the graph's ``adapter_bank``; row 0 is zeros.
        row_changed: called with the number of a row that was written and that nobody uses;
            never twice at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        slots: int | None,
        default: int = DEFAULT_SLOTS,
        *,
        partial: bool = False,
        precision: Precision = "float32",
    ) -> None:
        """Open with the bundle's adapters.

        Args:
            bundle: whose adapters.
            slots: rows of the bank, row 0 included; None: ``default`` or what is needed.
            default: see ``slots``.
            partial: take the first adapters where not all have a row, instead of an error.
            precision: of the graph, whose ranges later adapters may leave.
        """
        self._precision = precision
        self._manifest = bundle.manifest
        stored = bundle.bank()
        entries = bundle.manifest.adapters
        needed = max([BACKBONE_ROW, *(a.row for a in entries if a.row is not None)]) + 1
        slots = (
            max(default, needed) if slots is None else whole(slots, "slots", 1, None, SessionError)
        )
        if slots < needed and not (partial and slots > 1):
            raise SessionError(
                f"`slots={slots}` is too small: the bundle's adapters take rows up to "
                f"{needed - 1}. Open it with `slots={needed}` or more."
            )
        try:
            # np.zeros is lazy: rows that no adapter uses take no memory.
            self.rows: NDArray[np.float32] = np.zeros((slots, stored.shape[1]), np.float32)
        except (MemoryError, ValueError) as error:
            raise SessionError(
                f"`slots={slots}`: there is no room for so many rows of {4 * stored.shape[1]} "
                f"bytes: {error}. Open it with fewer."
            ) from error
        self._entries: dict[str, AdapterEntry] = {}
        for index, entry in enumerate(entries[: slots - 1], 1):
            # An adapter keeps its row where it can: an engine may have the rows baked in.
            row = entry.row if slots >= needed else index
            assert row is not None
            self.rows[row] = stored[entry.row]
            self._entries[entry.name] = replace(entry, row=row)
        self._given: set[Hold] = set()  # and not released
        # Row -> requests that hold it.
        self._holds = dict.fromkeys((a.row for a in self._entries.values()), 0)
        self._retired: set[int] = set()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closed = False
        self.row_changed: Callable[[int], None] = lambda row: None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._entries))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __getitem__(self, name: str) -> AdapterEntry:
        """The entry of an adapter. Raises `SessionError` listing the names there are."""
        with self._lock:
            return self._entry(name)

    @property
    def slots(self) -> int:
        """Rows of the bank, row 0 included."""
        return int(self.rows.shape[0])

    def add(
        self,
        name: str,
        adapter: str | Path | Adapter,
        *,
        replace_existing: bool = False,
        progress: Progress = lambda step: None,
    ) -> AdapterEntry:
        """Load an adapter into a free row. Needs NumPy and safetensors alone.

        Args:
            name: what requests will call it.
            adapter: an adapter directory, or one that was loaded.
            replace_existing: allow a name that is in use; requests in flight keep the old one.
            progress: is told what is assumed of it, as `add_adapter`'s is.

        Raises:
            AdapterError, PlanError, CapacityError: see `hhdeploy.bundle.membership.admit`.
            SessionError: the name is taken, no row is free, or the session is closed.
        """
        progress = listener(progress)
        with self._lock:
            self._check_open()
        packed = self.pack(name, adapter)
        for line in packed.notes:
            progress(line)
        return self.put(packed, replace_existing=replace_existing)

    def pack(
        self,
        name: str,
        adapter: str | Path | Adapter,
        *,
        verified: bool = False,
        bundled: bool = False,
    ) -> Packed:
        """The slow half of `add`: read, check and pack an adapter; the bank is not touched.

        ``bundled``: it is one of the bundle's own, which a calibration may have seen.
        """
        loaded = checked_adapter(adapter) if isinstance(adapter, Adapter) else load_adapter(adapter)
        notes: list[str] = []
        row = admit(self._manifest, name, loaded, notes.append)
        notes += [] if bundled else unseen(name, [self._precision])
        entry = entry_of(name, None, loaded, self._manifest.backbone, verified=verified)
        return Packed(entry, row, tuple(notes))

    def put(self, packed: Packed, *, replace_existing: bool = False) -> AdapterEntry:
        """The quick half of `add`: give a packed adapter a free row and its name."""
        name = packed.entry.name
        with self._lock:
            self._check_open()
            self._check_taken(name, replace_existing)
            row = self._free_row()
            self._holds[row] = 1  # held by this call until the row is complete
        try:
            self._write(row, packed.row)
            with self._lock:
                self._check_taken(name, replace_existing)  # another thread may have been faster
                entry = replace(packed.entry, row=row)
                old, self._entries[name] = self._entries.get(name), entry
                self._holds[row] = 0
        except BaseException:
            with self._lock:
                del self._holds[row]
            raise
        if old is not None:
            with self._lock:
                idle = self._retire(old)
            self._clear(idle)
        return entry

    def remove(self, name: str) -> None:
        """Forget an adapter; its row is free once the requests that use it are done."""
        with self._lock:
            self._check_open()
            if self._manifest.bank_as_constant:
                raise SessionError(
                    "the bank is baked into this graph or engine: adapters cannot be removed."
                )
            entry = self._entry(name)
            del self._entries[name]
            idle = self._retire(entry)
        self._clear(idle)

    def hold(self, name: str | None) -> Hold:
        """The row of an adapter (None: the backbone), which keeps its values until `release`.

        Raises:
            SessionError: no such adapter, no classifier of the bare backbone, or the session is
                closed.
        """
        with self._lock:
            self._check_open()
            row = self._row(name)
            self._take(row)
            hold = Hold(row, None if name is None or row == BACKBONE_ROW else self._entries[name])
            self._given.add(hold)
            return hold

    def release(self, hold: Hold) -> None:
        """Give a row back. Every `hold` needs exactly one.

        Raises:
            SessionError: it was given back already, or is another bank's. (It would be counted as
                another request's, and the row be cleared while that one uses it.)
        """
        if not isinstance(hold, Hold):
            raise SessionError(f"release: expected a Hold of this bank, found {hold!r}.")
        with self._lock:
            if hold not in self._given:
                of = hold.entry.name if hold.entry is not None else BACKBONE
                raise SessionError(
                    f"release: expected a hold of this bank that is not released, found one of row "
                    f"{hold.row} ({of!r}) that is, or is another bank's. Release each exactly once."
                )
            self._given.remove(hold)
            idle = self._release([hold.row])
        self._clear(idle)

    def held(self, name: str) -> bool:
        """True while requests hold the adapter's row."""
        with self._lock:
            row = self._entry(name).row
            assert row is not None
            return self._holds[row] > 0

    @property
    def free_rows(self) -> int:
        """Rows that an adapter could be put into now."""
        with self._lock:
            return self.slots - 1 - len(self._holds)

    @contextmanager
    def lease(self, names: Sequence[str | None]) -> Iterator[NDArray[np.int64]]:
        """Rows of some adapters (None: the backbone), held while in the block."""
        with self._lock:
            rows = [self._row(name) for name in names]
            for row in rows:
                self._take(row)
        try:
            yield np.asarray(rows, np.int64)
        finally:
            with self._lock:
                idle = self._release(rows)
            self._clear(idle)

    def close(self) -> None:
        """Refuse from now on to add, remove and hold adapters: the session's graph is gone. What is
        held is released as ever."""
        with self._lock:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise closed()

    def _check_taken(self, name: str, replace_existing: bool) -> None:
        if name in self._entries and not replace_existing:
            raise SessionError(f"an adapter {name!r} is loaded already; remove it first.")

    def _take(self, row: int) -> None:
        if row != BACKBONE_ROW:
            self._holds[row] += 1

    def _entry(self, name: str) -> AdapterEntry:
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            known = abbreviate(self._entries, 20) or "none"
            raise SessionError(f"unknown adapter {name!r}. Loaded are: {known}.")
        return entry

    def _row(self, name: str | None) -> int:
        if name is None or (isinstance(name, str) and name == BACKBONE):
            if not self._manifest.answers_backbone:
                raise SessionError(
                    "this bundle has no classifier of the bare backbone: name an adapter for "
                    "every image, or export with `keep_backbone_head=True`."
                )
            return BACKBONE_ROW
        row = self._entry(name).row
        assert row is not None
        return row

    def _free_row(self) -> int:
        for row in range(1, self.slots):
            if row not in self._holds:
                return row
        raise CapacityError(
            f"all {self.slots - 1} rows of the bank are in use. Remove an adapter, or open the "
            f"session with `slots={2 * self.slots}`."
        )

    def _retire(self, entry: AdapterEntry) -> list[int]:
        """Its row, if nobody holds it, for `_clear`; else the last `_release` gives it."""
        assert entry.row is not None
        self._retired.add(entry.row)
        return self._idle([entry.row])

    def _release(self, rows: Sequence[int]) -> list[int]:
        """Give rows back; those that nobody can reach any more are for `_clear`."""
        held = [row for row in rows if row != BACKBONE_ROW]
        for row in held:
            self._holds[row] -= 1
        return self._idle(held)

    def _idle(self, rows: Sequence[int]) -> list[int]:
        """Retired rows that nobody holds: from now on whoever clears them does."""
        idle = [row for row in dict.fromkeys(rows) if row in self._retired and not self._holds[row]]
        for row in idle:
            self._retired.remove(row)
            self._holds[row] = 1
        return idle

    def _clear(self, rows: Sequence[int]) -> None:
        """Zero rows of `_idle`, then they are free. Without the lock, as it may take a while."""
        for row in rows:
            try:
                # A backend that is gone says so in the next run, to those whom it concerns, not
                # to the request that was the last to hold the row.
                with suppress(DeviceError):
                    self._write(row, 0.0)
            finally:
                with self._lock:
                    del self._holds[row]

    def _write(self, row: int, values: NDArray[np.float32] | float) -> None:
        """The one place where a row that nobody uses changes."""
        with self._writing:
            self.rows[row] = values
            self.row_changed(row)
