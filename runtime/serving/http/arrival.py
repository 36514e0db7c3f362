"""What arrives on a connection, within limits: of heads, of time, and of the loop's turns.

uvicorn's own timeout is for connections between two requests: one that never sends a request, or
whose request never ends, would stay for ever, and headers without end would be collected in memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.errors import BusyError, RequestError
from hhdeploy.runtime.serving.http.leaving import LeavingProtocol, turn_away
from hhdeploy.runtime.serving.http.upgrades import RequestParser

# Of everything but bodies: request line, headers, trailers, lengths of chunks.
MOST_HEAD_BYTES: Final = 1 << 16
# What a client skips that waits for an answer, and how often it is sent to one that says no more.
_INTERIM: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_LOOK_SECONDS: Final = 0.2
# What is taken of a connection at once, and how much of a body waits for no turn.
PIECE_BYTES: Final = 1 << 18
_SMALL_BYTES: Final = 1 << 16
# Between two pieces while the server is crowded: they get about a fifth of the loop.
PAUSE_SECONDS: Final = 1e-3


def bounded_protocol(
    seconds: float,
    connections: int,
    refused: Callable[[HhdeployError], None],
    crowded: Callable[[], bool],
) -> type[HttpToolsProtocol]:
    """The protocol for `uvicorn.Config`.

    Args:
        seconds: after which a connection is closed whose request has not arrived as a whole, from
            its first byte or, of the first request, from the beginning of the connection; or whose
            client takes nothing of an answer, see `LeavingProtocol`.
        connections: at the same time, or requests; those beyond are answered with 503.
        refused: is told of every request that the application does not see: what is no HTTP, and
            those of connections beyond their limit.
        crowded: whether more requests wait than are answered soon, see `Turns`.
    """
    bounds_ = _Bounds(connections, refused, Turns(crowded))

    class OfOneServer(_BoundedProtocol):
        patience, bounds = seconds, bounds_

    return OfOneServer


@dataclass(frozen=True)
class _Bounds:
    """What the connections of one server share, see `bounded_protocol`; ``room``: what was read
    of the one that is read just now."""

    connections: int
    refused: Callable[[HhdeployError], None]
    turns: Turns
    room: memoryview = field(default_factory=lambda: memoryview(bytearray(PIECE_BYTES)))


class _BoundedProtocol(LeavingProtocol, asyncio.BufferedProtocol):
    """A connection within its server's bounds; see `bounded_protocol`."""

    bounds: _Bounds
    _deadline: asyncio.TimerHandle | None = None
    # A request has begun, and not arrived as a whole.
    _arriving = False
    # Bytes that came since the headers' end or since the body went on.
    _beside = 0
    # Bytes of the body that is arriving.
    _of_body = 0

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.parser = RequestParser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _InTurn(transport, self.bounds.turns)
        self._deadline = self.loop.call_later(self.patience, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.bounds.room

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.bounds.room[:nbytes]))

    def data_received(self, data: bytes) -> None:
        self._beside += len(data)
        super().data_received(data)
        # Most have arrived by now: a timer for each is none that would ever end.
        if self._arriving and self._deadline is None:
            self._deadline = self.loop.call_later(self.patience, self.transport.close)
        if self._beside > MOST_HEAD_BYTES and not self.transport.is_closing():
            message = f"Headers beyond {MOST_HEAD_BYTES} bytes."
            self.logger.warning(message)
            self.send_400_response(message)
        if self._of_body > _SMALL_BYTES:
            self._go_on_in_turn()

    def _go_on_in_turn(self) -> None:
        self.flow.pause_reading()  # until the application asks for more
        if self.cycle.response_complete:
            self.flow.resume_reading()  # which it never will: the rest is dropped

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that has said all may wait for its answer, or may have left.

        The one sees interim answers and skips them, the other's machine refuses them. A proxy
        of HTTP/1.0, which knows none, has left.
        """
        cycle = self.pipeline[0][0] if self.pipeline else self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return None
        if self.scheme == "https" or _of_old_proxy(cycle.scope):  # TLS has no half of one
            return None
        cycle.keep_alive = False
        self._look_for_it()
        return True

    def _look_for_it(self) -> None:
        cycle = self.cycle
        if self.transport.is_closing() or cycle is None or cycle.response_started:
            return
        if cycle.scope["http_version"] != "1.0":  # which knows no interim answers
            self.transport.write(_INTERIM)
        self.loop.call_later(_LOOK_SECONDS, self._look_for_it)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arriving = True

    def send_400_response(self, msg: str) -> None:
        self.bounds.refused(RequestError(msg))
        super().send_400_response(msg)

    def on_header(self, name: bytes, value: bytes) -> None:
        if "method" not in self.scope:  # else behind the body, where no header is looked for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # it is read once more, without the offer
        if max(len(self.connections), len(self.tasks)) >= self.bounds.connections:
            self.bounds.refused(BusyError("too many connections."))
            self.app = turn_away  # of all requests of this connection: it is closed
        super().on_headers_complete()
        self._beside = self._of_body = 0

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._beside = 0
        self._of_body += len(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._beside = self._of_body = 0
        self._arrived()

    def _arrived(self) -> None:
        self._arriving = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _of_old_proxy(scope: Mapping[str, Any]) -> bool:
    """Whether a request is of HTTP/1.0 and says what is so in any case: nginx does, as it comes.

    Of what else speaks HTTP/1.0, some close their half once they have said all (netcat).
    """
    closes = (b"connection", b"close") in ((k, v.lower()) for k, v in scope["headers"])
    return scope["http_version"] == "1.0" and closes


class Turns:
    """Large bodies go on one after the other, one in each turn of the event loop.

    A piece of one costs the loop what a small request does: pieces of all at once would keep
    everybody else waiting, again and again. While the server is crowded there is a pause after
    each: what is refused in the end must not cost the loop of those that are answered, and of
    those that are taken nobody waits for more bodies than the session gets through.
    """

    def __init__(self, crowded: Callable[[], bool]) -> None:
        self._crowded = crowded
        self._waiting: deque[Callable[[], None]] = deque()
        self._under_way = False

    def wait(self, go_on: Callable[[], None]) -> None:
        """``go_on`` is called in its turn."""
        self._waiting.append(go_on)
        if not self._under_way:
            self._under_way = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._under_way = bool(self._waiting)
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        if self._crowded():
            loop.call_later(PAUSE_SECONDS, self._next)
        else:
            loop.call_soon(self._next)
        self._waiting.popleft()()


class _InTurn(FlowControl):
    """A connection that was paused is read again when its turn has come."""

    def __init__(self, transport: asyncio.Transport, turns: Turns) -> None:
        super().__init__(transport)
        self._turns, self._waits = turns, False

    def resume_reading(self) -> None:
        if self.read_paused and not self._waits:
            self._waits = True
            self._turns.wait(self._go_on)

    def _go_on(self) -> None:
        self._waits = False
        super().resume_reading()
