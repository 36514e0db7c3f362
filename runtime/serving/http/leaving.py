"""What leaves on a connection, within limits: answers whose client does not read them.

A connection takes what it is given, and holds what its client does not read: an answer of tens of
megabytes for as long as the client likes. So a large answer is given piece by piece, each once the
one before is gone; until then it is the application's, which counts it among the bodies that it
holds. A client that takes nothing for too long loses its connection.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

from httptools import HttpParserCallbackError
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LOG = logging.getLogger("hhdeploy.serve.http")
# Of an answer: at once, and what is not counted.
_PIECE_BYTES: Final = 1 << 16
# Of a request's scope: where it says how its connection is ended.
_EXTENSION: Final = "hhdeploy.connection"
# The last answer of a connection.
_LAST: Final = {"connection": "close"}


class LeavingProtocol(HttpToolsProtocol):
    """Ends a connection whose client does not take what it is given; answers what is no request.

    Attributes:
        patience: seconds that a piece may take.
    """

    patience: float
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Whatever is left of an answer counts."""
        super().connection_made(transport)
        # By default 64 KiB may wait, and a connection that is closed waits for them for ever.
        transport.set_write_buffer_limits(high=1)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is waited for any more."""
        self._all_read()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Let the application end the connection, see `send_answer`."""
        super().on_message_begin()
        self.scope["extensions"] = {_EXTENSION: {"abort": self.transport.abort}}

    def send_400_response(self, msg: str) -> None:
        """The last answer, in the protocol's form; where a parser's error is handled, of that."""
        found = sys.exc_info()[1]
        if isinstance(found, HttpParserCallbackError):  # uvicorn's, which has kept the rest
            text = "expected a request of HTTP/1.1, its target a path below 64 KiB."
        elif found is not None:
            text = f"expected a request of HTTP/1.1: {str(found).rstrip('.')}."
        else:
            text = msg
        answer = JSONResponse({"error": text}, 400, _LAST)
        head = [b"%b: %b\r\n" % each for each in answer.raw_headers]
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\n%b\r\n%b" % (b"".join(head), bytes(answer.body))
        )
        self.transport.close()

    def pause_writing(self) -> None:
        """Something is left: begin to wait."""
        super().pause_writing()
        self._all_read()
        self._unread = self.loop.call_later(self.patience, _end, self.transport.abort, self.client)

    def resume_writing(self) -> None:
        """All was taken."""
        super().resume_writing()
        self._all_read()

    def _all_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


async def turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of connections beyond the limit."""
    text = "too many connections: try again later, or on one that there is."
    await JSONResponse({"error": text}, 503, _LAST)(scope, receive, send)


def _end(abort: Callable[[], object], peer: object) -> None:
    _LOG.warning("answer not read: connection closed", extra={"peer": peer})
    abort()


async def send_answer(
    response: Response,
    scope: Scope,
    receive: Receive,
    send: Send,
    counted: Callable[[int, Callable[[], object]], AbstractContextManager[None]],
) -> None:
    """Send a response; a large one piece by piece, where the connection is a `LeavingProtocol`'s.

    Args:
        response: whole.
        scope, receive, send: of its request.
        counted: counts so many bytes until the end of a block; calls what ends the connection
            where they are too much.

    Raises:
        BusyError: see `Bodies.leaving`; nothing was sent.
    """
    content = bytes(response.body)
    connection: Any = scope.get("extensions", {}).get(_EXTENSION)
    if connection is None or len(content) <= _PIECE_BYTES:
        await response(scope, receive, send)
        return
    with counted(len(content), partial(_end, connection["abort"], scope.get("client"))):
        start = {"type": "http.response.start", "status": response.status_code}
        await send({**start, "headers": response.raw_headers})
        for begin in range(0, len(content), _PIECE_BYTES):
            end = begin + _PIECE_BYTES
            piece = {"type": "http.response.body", "body": content[begin:end]}
            await send({**piece, "more_body": end < len(content)})
