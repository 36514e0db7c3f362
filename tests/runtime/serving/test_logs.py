"""Log lines that nobody waits for."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hhdeploy.runtime.serving import logs
from hhdeploy.runtime.serving.logs import JsonFormatter, Repeats, WaitlessHandler, log_as_json
from tests.runtime.serving.servers import running_server


class Stuck:
    """A stream that nobody reads until it is let go."""

    def __init__(self) -> None:
        self.go, self.written = threading.Event(), []

    def write(self, text: str) -> None:
        self.go.wait(60)
        self.written.append(text)

    def flush(self) -> None:
        pass


def record(message: str = "said", level: int = logging.INFO, line: int = 1) -> logging.LogRecord:
    return logging.LogRecord("hhdeploy.serve", level, "file.py", line, message, None, None)


def test_a_reader_that_stopped_stops_nobody(monkeypatch):
    monkeypatch.setattr(logs, "_MOST_LINES", 3)
    monkeypatch.setattr(logs, "_FLUSH_SECONDS", 0.05)
    stream = Stuck()
    handler = WaitlessHandler(stream)
    handler.setFormatter(logging.Formatter("{message}", style="{"))
    for number in range(10):
        handler.emit(record(str(number)))
    assert handler.dropped >= 4  # three wait, and three may be on their way
    handler.close()  # nor does the end of the process
    dropped = handler.dropped
    stream.go.set()
    while handler.waiting:
        time.sleep(0.001)
    after = record("after")
    handler.emit(after)
    handler.close()
    assert after.dropped == dropped
    last = record("last")
    handler.emit(last)
    assert not hasattr(last, "dropped")
    handler.close()
    written = "".join(stream.written).split()
    assert written[-2:] == ["after", "last"]
    assert written[:3] == ["0", "1", "2"] and len(written) == 10 - dropped + 2


def test_lines_that_come_together_are_written_at_once():
    """One wake-up of a thread for all of them, not one a request."""
    stream = Stuck()
    handler = WaitlessHandler(stream)
    handler.setFormatter(logging.Formatter("{message}", style="{"))
    handler.emit(record("0"))
    while handler._lines.qsize():  # the writer has it
        time.sleep(0.001)
    time.sleep(2 * logs._COMPANY_SECONDS)
    for number in range(1, 100):
        handler.emit(record(str(number)))
    stream.go.set()
    handler.close()
    assert "".join(stream.written).split() == [str(n) for n in range(100)]
    assert len(stream.written) < 10


def test_what_repeats_is_written_a_few_times_a_second(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    repeats = Repeats()
    let = [repeats.filter(record(level=logging.ERROR)) for _ in range(1000)]
    assert let == [True] * 5 + [False] * 995
    assert repeats.filter(record(level=logging.ERROR, line=2))  # another one
    assert all(repeats.filter(record()) for _ in range(100))  # requests are counted by nobody
    now[0] += 1.5
    again = record(level=logging.ERROR)
    assert repeats.filter(again) and again.repeated == 995


def test_a_line_is_one_object():
    said = record("all of %s")
    said.args, said.created = ("it",), 1769860800.1239
    said.peer, said.color_message, said.adapter = "::1", "colours", Path("a/\u00e4")
    assert JsonFormatter().format(said) == (
        '{"time": "2026-01-31T12:00:00.123Z", "level": "INFO", "logger": "hhdeploy.serve", '
        '"message": "all of it", "peer": "::1", "adapter": "a/\\u00e4"}'
    )
    try:
        raise ValueError("two\nlines")
    except ValueError:
        said.exc_info = sys.exc_info()
    line = JsonFormatter().format(said)
    assert "\n" not in line
    assert json.loads(line)["exc_info"].endswith("ValueError: two\nlines")


@pytest.fixture
def loggers() -> Iterator[None]:
    """Handlers and levels are as they were afterwards."""
    found = [logging.getLogger(), logging.getLogger("hhdeploy")]
    before = [(each, each.handlers[:], each.level) for each in found]
    yield
    for each, handlers, level in before:
        each.handlers[:] = handlers
        each.setLevel(level)


@pytest.mark.parametrize("logger", [None, "hhdeploy"])
@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_debug_lines_are_our_own_alone(loggers, logger, level):
    """HTTP/2's package writes every header then, with the tokens that clients present."""
    log_as_json(level, logger)
    number = getattr(logging, level.upper())
    assert logging.getLogger("hhdeploy.serve.grpc").getEffectiveLevel() == number
    assert not logging.getLogger("hpack.hpack").isEnabledFor(logging.DEBUG)
    if logger is None:
        assert logging.getLogger("asyncio").getEffectiveLevel() == max(number, logging.INFO)


def test_a_blocked_standard_error_does_not_block_the_server(small, tmp_path):
    """Its pipe is full and nobody reads it: requests are answered, and health is."""
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with running_server(
            small, pipe, "--model-name", "tiny", "--grpc-port", "-1", "--log-level", "debug"
        ) as server:
            for _ in range(600):  # of 190 bytes each: the 64 KiB of a pipe are full
                assert server.request("GET", "/v2/health/live")[0] == 200
            assert json.loads(server.request("GET", "/v2/health/ready")[2]) == {"ready": True}
            with contextlib.suppress(BlockingIOError):  # its end waits for what it has to say
                while os.read(reader, 1 << 16):
                    pass
    finally:
        os.close(reader)
