"""Log lines as JSON, one object a line, on standard error, which nobody waits for.

Whoever reads them may be slow, or have stopped: lines wait in a queue that a thread writes, and
what it has no room for is dropped and counted. Warnings and errors that repeat without end, e.g.
where no connection can be taken for want of file descriptors, are written a few times a second.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import queue
import re
import secrets
import sys
import threading
import time
from typing import Final, TextIO

# Lines that wait to be written.
_MOST_LINES = 10_000
# A line waits so long for others: one wake-up and one write for all of them.
_COMPANY_SECONDS = 0.02
# How long the end of the process waits for them.
_FLUSH_SECONDS = 2.0
# Of one message: so many lines in so many seconds.
_MOST_REPEATED, _PERIOD_SECONDS = 5, 1.0
# The header that carries a request's id, on both wires.
REQUEST_ID: Final = "x-request-id"
_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")
# What every record has. `color_message`: uvicorn's messages once more, with terminal colours.
_NO_EXTRAS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
_JSON = json.JSONEncoder(default=str)
# Of which all lines are ours.
_OWN = "hhdeploy"
# Of what a line quotes.
_MOST_TEXT = 200


class Asked:
    """One request on either wire, from its arrival: who asked what, and how it ended.

    Attributes:
        id: what the client called it; a name of our own where it gave none that a log can hold.
        said: what its line has beside: the wire says what was asked, and how it ended.
    """

    def __init__(self, peer: str | None, given_id: str | None, **said: object) -> None:
        """``peer``: who asks, an address; None: not known."""
        given = given_id is not None and _GIVEN_ID.fullmatch(given_id)
        self.id = given_id if given and given_id is not None else secrets.token_hex(8)
        self.said: dict[str, object] = {**said, "peer": peer}
        self._begin = time.perf_counter()

    def refused(self, problem: Exception) -> None:
        """It failed: why."""
        self.said["reason"] = str(problem)[:_MOST_TEXT]

    def write(self, log: logging.Logger, level: int) -> None:
        """Its line, once it is answered."""
        if log.isEnabledFor(level):
            ms = round(1e3 * (time.perf_counter() - self._begin), 3)
            said = {**self.said, "request_id": self.id, "ms": ms}
            # As `log.log` has it, which would look through the stack for who called it.
            log.handle(log.makeRecord(log.name, level, "", 0, "request", (), None, extra=said))


class WaitlessHandler(logging.Handler):
    """Hands lines to a thread that writes them.

    Attributes:
        dropped: lines that there was no room for.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.dropped = 0
        self._told = 0
        # No lock of its own, which the thread could hold while it waits for the interpreter's.
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # How many were queued, and written or given up: `emit` alone, the thread alone.
        self._queued = self._done = 0
        self._stream = stream
        self._thread = threading.Thread(target=self._write, name="hhdeploy-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or drop it. The first line after some that were dropped says how many."""
        try:
            if self.dropped > self._told:
                record.dropped = self.dropped - self._told
            line = self.format(record) + "\n"
        except Exception:  # noqa: BLE001 - as logging has it: a line never fails a request
            self.handleError(record)
            return
        if self._lines.qsize() >= _MOST_LINES:
            self.dropped += 1
            return
        self._queued += 1
        self._lines.put(line)
        self._told = self.dropped

    @property
    def waiting(self) -> int:
        """Lines that are not written yet."""
        return self._queued - self._done

    def close(self) -> None:
        """Wait a moment until everything is written."""
        end = time.monotonic() + _FLUSH_SECONDS
        while self.waiting and time.monotonic() < end:
            time.sleep(0.005)
        super().close()

    def _write(self) -> None:
        while True:
            lines = [self._lines.get()]
            time.sleep(_COMPANY_SECONDS)
            with contextlib.suppress(queue.Empty):
                while True:
                    lines.append(self._lines.get_nowait())
            try:
                self._stream.write("".join(lines))
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more
                self.dropped += len(lines)
            finally:
                self._done += len(lines)


class Repeats(logging.Filter):
    """Lets a warning or error through a few times a second; the next line says how many were not.

    Two are the same if their place in the code is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, int], list[float]] = {}
        self._left_out: dict[tuple[str, int], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written."""
        if record.levelno < logging.WARNING:
            return True
        place, now = (record.pathname, record.lineno), time.monotonic()
        recent = [t for t in self._seen.get(place, ()) if t > now - _PERIOD_SECONDS]
        if len(recent) >= _MOST_REPEATED:
            self._left_out[place] = self._left_out.get(place, 0) + 1
            return False
        self._seen[place] = [*recent, now]
        if left_out := self._left_out.pop(place, 0):
            record.repeated = left_out
        return True


def log_as_json(level: str, logger: str | None = None) -> None:
    """Write what is logged from ``level`` on.

    Of other packages debug lines are left out whatever the level: what they are told of headers,
    tokens included, would be in them.

    Args:
        level: debug, info, warning or error.
        logger: the one whose lines they are; None: all of the process.
    """
    handler = WaitlessHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(Repeats())
    chosen = logging.getLogger(logger)
    chosen.handlers[:] = [handler]
    number: int = getattr(logging, level.upper())
    chosen.setLevel(max(number, logging.INFO))
    logging.getLogger(_OWN).setLevel(number)


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, what was given as ``extra``, exceptions.

    The time is in UTC, as RFC 3339 has it: ``2026-01-31T12:00:00.123Z``. An extra that JSON does
    not have is its text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """A line without its end."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        said = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        said.update((k, v) for k, v in record.__dict__.items() if k not in _NO_EXTRAS)
        if record.exc_info:
            said["exc_info"] = self.formatException(record.exc_info)
        return _JSON.encode(said)
