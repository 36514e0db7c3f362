"""What arrives on a connection, within limits: heads and time, then bodies.

uvicorn's own timeout is for connections between two requests: one that never sends a request, or
whose request never ends, would stay for ever, and headers without end would be collected in memory.
Bodies are counted as long as they are held.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.errors import BusyError, RequestError, TooLargeError
from hhdeploy.runtime.serving.http.codec import Body, read_encoding
from hhdeploy.runtime.serving.http.heads import header
from hhdeploy.runtime.serving.http.leaving import LeavingProtocol, turn_away
from hhdeploy.runtime.serving.http.upgrades import RequestParser

# Of everything but bodies: request line, headers, trailers, lengths of chunks.
MOST_HEAD_BYTES: Final = 1 << 16
# What a client skips that waits for an answer, and how often it is sent to one that says no more.
_INTERIM: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_LOOK_SECONDS: Final = 0.2
# A body that takes longer to arrive makes room where there is none.
SLOW_SECONDS: Final = 1.0
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

    turns = Turns(crowded)
    room = memoryview(bytearray(PIECE_BYTES))  # of the connection that is read just now

    class BoundedProtocol(LeavingProtocol, asyncio.BufferedProtocol):
        patience = seconds
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
            self.flow = _InTurn(transport, turns)
            self._deadline = self.loop.call_later(seconds, transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived()
            super().connection_lost(exc)

        def get_buffer(self, sizehint: int) -> memoryview:
            return room

        def buffer_updated(self, nbytes: int) -> None:
            self.data_received(bytes(room[:nbytes]))

        def data_received(self, data: bytes) -> None:
            self._beside += len(data)
            super().data_received(data)
            # Most have arrived by now: a timer for each is none that would ever end.
            if self._arriving and self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self.transport.close)
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
            refused(RequestError(msg))
            super().send_400_response(msg)

        def on_header(self, name: bytes, value: bytes) -> None:
            if "method" not in self.scope:  # else behind the body, where no header is looked for
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            if self.parser.should_upgrade():
                return  # it is read once more, without the offer
            if max(len(self.connections), len(self.tasks)) >= connections:
                refused(BusyError("too many connections."))
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

    return BoundedProtocol


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


@dataclass(eq=False)
class _OnTheWay:
    """A body that has not arrived as a whole, ``held`` bytes have; or an answer that is not taken.

    ``end``: gives it up.
    """

    end: Callable[[], object]
    since: float
    held: int = 0
    given_up: bool = False


class Bodies:
    """The bodies that one server holds. Many small requests may be large together.

    Where they are too large together, those that arrive slowly make room, and answers that are
    taken slowly: nobody can keep others out with bodies that never end, or that nobody reads.
    """

    def __init__(self, most: int) -> None:
        """``most``: bytes of all bodies at the same time."""
        self._most = most
        self._held = 0
        self._on_the_way: set[_OnTheWay] = set()

    def read(self, request: Request, limit: int) -> _Held:
        """``async with`` it: the whole body; refused as soon as it is longer than ``limit``. It is
        counted until the end of the block.

        Raises:
            TooLargeError: it is.
            BusyError: all bodies together are beyond the server's limit.
            RequestError: it is not as long as its header says; see `read_encoding`.
        """
        return _Held(self, request, limit)

    async def take(self, request: Request, limit: int) -> Body:
        """See `read`: a body whose bytes are counted as held until `give_back`."""
        declared = header(request, b"content-length") or ""
        told = int(declared[:18]) if declared.isascii() and declared.isdigit() else None
        if told is not None and told > limit:
            raise TooLargeError(f"the body is {told} bytes, at most {limit} are taken.")
        encoding = read_encoding(header(request, b"content-encoding"))
        content = await self._arrived(request, limit)
        if told is not None and told != len(content):  # not this server's own connections: Ray's
            self.give_back(len(content))
            raise RequestError(
                f"Content-Length: expected a body of {told} bytes, {len(content)} arrived: "
                "something between lost them. Send the request without the header Upgrade."
            )
        return Body(content, encoding, limit)

    def give_back(self, held: int) -> None:
        """Bytes that are held no more."""
        self._held -= held

    async def _arrived(self, request: Request, limit: int) -> bytes:
        """The body as it came, whose bytes are counted as held."""
        piece, more = await _piece(request, 0, limit)
        if not more:
            self._take(len(piece))
            return piece
        body = io.BytesIO()  # grows as one piece, which the kernel moves and takes back
        task = asyncio.current_task()
        arriving = _OnTheWay(getattr(task, "cancel", int), time.monotonic())
        self._on_the_way.add(arriving)
        try:
            while True:
                self._take(len(piece), arriving)
                arriving.held += len(piece)
                body.write(piece)
                if not more:
                    break
                piece, more = await _piece(request, body.tell(), limit)
            arriving.held = 0  # it is the caller's
        except asyncio.CancelledError:
            if not arriving.given_up:
                raise
            getattr(task, "uncancel", int)()  # Python 3.10 does not count
            raise self._busy() from None
        finally:
            self._on_the_way.discard(arriving)
            self._held -= arriving.held
        return body.getvalue()

    @contextlib.contextmanager
    def leaving(self, size: int, end: Callable[[], object]) -> Iterator[None]:
        """Count an answer's bytes until the end of the block; ``end``: ends its connection.

        Raises:
            BusyError: see `read`.
        """
        self._take(size)
        leaving = _OnTheWay(end, time.monotonic(), size)
        self._on_the_way.add(leaving)
        try:
            yield
        finally:
            self._on_the_way.discard(leaving)
            self._held -= leaving.held

    def _take(self, size: int, own: _OnTheWay | None = None) -> None:
        while self._held + size > self._most:
            begun = time.monotonic() - SLOW_SECONDS
            slow = [each for each in self._on_the_way if each.since < begun and each.held]
            largest = max(slow, key=lambda each: each.held, default=own)
            if largest is None or largest is own:
                raise self._busy()
            self._give_up(largest)
        self._held += size

    def _give_up(self, slow: _OnTheWay) -> None:
        self._on_the_way.discard(slow)
        self._held -= slow.held
        slow.held, slow.given_up = 0, True
        slow.end()

    def _busy(self) -> BusyError:
        return BusyError(
            f"the bodies of all requests and answers are {self._held} bytes, at most {self._most} "
            f"are held, and of those under way for more than {SLOW_SECONDS:g} s less. Try again "
            "later."
        )


async def _piece(request: Request, before: int, limit: int) -> tuple[bytes, bool]:
    """The next piece of a body, after ``before`` bytes, and whether there are more.

    Raises:
        TooLargeError: the body is longer than ``limit``.
        ClientDisconnect: there is none.
    """
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    piece: bytes = message.get("body", b"")
    if before + len(piece) > limit:
        raise TooLargeError(f"the body is beyond {limit} bytes.")
    return piece, message.get("more_body", False)


class _Held:
    """See `Bodies.read`. No generator, whose steps would cost more than a small body's."""

    def __init__(self, bodies: Bodies, request: Request, limit: int) -> None:
        self._bodies, self._request, self._limit = bodies, request, limit
        self._bytes = 0

    async def __aenter__(self) -> Body:
        body = await self._bodies.take(self._request, self._limit)
        self._bytes = len(body.content)
        return body

    def add(self, size: int) -> None:
        """Count what came of the body beside it. Raises `BusyError`, as `Bodies.read` does."""
        self._bodies._take(size)
        self._bytes += size

    async def __aexit__(self, *_: object) -> None:
        self._bodies.give_back(self._bytes)
