"""What a fleet knows of its adapters, and what it tells of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.runtime.serving.errors import FailedError, NotFoundError, RequestError
from hhdeploy.runtime.serving.fleet.folders import Source

AdapterState = Literal["ready", "on disk", "broken", "unloaded"]


@dataclass(frozen=True)
class Known:
    """An adapter that the fleet can name.

    Attributes:
        source: its folder, when it was last looked at.
        problem: why it cannot be loaded; "" if nothing is known against it.
        unloaded: taken out by `Fleet.unload`, until it is loaded again.
    """

    source: Source
    problem: str = ""
    unloaded: bool = False

    def state(self, has_row: bool) -> AdapterState:
        """A broken one that has a row still answers with what it was."""
        if self.unloaded:
            return "unloaded"
        if has_row:
            return "ready"
        return "broken" if self.problem else "on disk"


@dataclass(frozen=True)
class Status:
    """What an operator wants to know of one adapter.

    Attributes:
        entry: in its row; None: it has none.
        read: as it was last read, whether it has a row or not; None: never.
        bundled: it is the bundle's, which no request can mend.
    """

    name: str
    state: AdapterState
    problem: str
    pinned: bool
    entry: AdapterEntry | None
    read: AdapterEntry | None = None
    bundled: bool = False

    @property
    def known(self) -> AdapterEntry | None:
        """What requests for it are answered by, as far as that is known."""
        return self.entry or self.read

    @property
    def answers(self) -> bool:
        """Whether requests may name it."""
        return self.state in ("ready", "on disk")

    def check(self, *, to_load: bool = False) -> None:
        """Refuse what names an adapter that does not answer, as its requests are refused.

        ``to_load``: what reads it next. The bundle's files may be back: they are tried.

        Raises:
            NotFoundError: it was unloaded.
            RequestError: it cannot be loaded. FailedError: nor is that its sender's fault.
        """
        if self.state == "unloaded":
            raise NotFoundError(f"adapter {self.name!r} was unloaded. Load it again first.")
        if self.state == "broken" and self.bundled:
            if not to_load:
                raise FailedError(self.problem)
        elif self.state == "broken":
            raise RequestError(f"adapter {self.name!r} cannot be loaded: {self.problem}")


@dataclass
class Counters:
    """What happened since the start; ``loaded`` is called with the seconds of every load."""

    failures: int = 0
    loaded: Callable[[float], None] = lambda seconds: None


def in_doubt(known: Known | None, found: Source | None) -> bool:
    """True if what a look found may be half of a replacement: a folder or a file is not there.

    A folder that is replaced by two renames, or written file by file, looks like that for a
    moment. ``found`` None: no folder; one of the bundle: none in the fleet directory any more.
    """
    if found is None or not found.whole:
        return True
    return found.bundled and known is not None and not known.source.bundled
