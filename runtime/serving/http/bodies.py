"""Bodies: counted as long as the server holds them, those that arrive and answers that leave; and
read, what is large in a process of its own, see `processes.parsing`.

A body of few bytes may be many once it is decompressed, which takes the same time from those that
are answered: so the process decompresses, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request

from hhdeploy.runtime.serving.errors import BusyError, RequestError, TooLargeError
from hhdeploy.runtime.serving.http.codec import (
    Body,
    decompressed,
    json_length,
    read_encoding,
    read_object,
    read_request,
)
from hhdeploy.runtime.serving.http.heads import header
from hhdeploy.runtime.serving.messages import InferRequest
from hhdeploy.runtime.serving.processes.parsing import Parser

# A body that takes longer to arrive makes room where there is none.
SLOW_SECONDS: Final = 1.0
# Of JSON, and of what was compressed; read at once: a few milliseconds.
SMALL: Final = 256 << 10


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


class BodyParser(Parser):
    """Reads the bodies of one server."""

    async def request(
        self, model: str, version: str, body: Body, header_length: str | None, most_json: int
    ) -> InferRequest:
        """See `read_request`, `decompressed` and `json_length`, with ``most_json``."""
        content = _at_once(body)
        if content is not None and json_length(content, header_length, most_json) <= SMALL:
            return read_request(model, version, content, header_length)
        message: InferRequest = await self.elsewhere(
            _size(body), _read_request, model, version, body, header_length, most_json
        )
        return message

    async def content(self, body: Body) -> dict[str, Any]:
        """See `read_object` and `decompressed`."""
        content = _at_once(body)
        if content is not None and len(content) <= SMALL:
            return read_object(content)
        found: dict[str, Any] = await self.elsewhere(_size(body), _read_object, body)
        return found


def _at_once(body: Body) -> bytes | None:
    """The content, decompressed; None if that is much, or may be."""
    if not body.encoding:
        return body.content
    if len(body.content) > SMALL:
        return None
    try:
        return decompressed(body.content, body.encoding, min(SMALL, body.limit))
    except TooLargeError:
        if body.limit <= SMALL:
            raise
        return None


def _size(body: Body) -> int:
    """Bytes that it counts as while it waits; nobody knows yet how many a compressed one is."""
    return max(len(body.content), SMALL)


def _read_request(
    model: str, version: str, body: Body, header_length: str | None, most_json: int
) -> InferRequest:
    content = decompressed(body.content, body.encoding, body.limit)
    json_length(content, header_length, most_json)
    return read_request(model, version, content, header_length)


def _read_object(body: Body) -> dict[str, Any]:
    return read_object(decompressed(body.content, body.encoding, body.limit))
