"""uvicorn's HTTP protocol within limits that it does not have: of headers, and of time.

Its own timeout is for connections between two requests: one that never sends a request, or whose
request never ends, would stay for ever, and headers without end would be collected in memory.
"""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of everything but bodies: request line, headers, trailers, lengths of chunks.
MOST_HEAD_BYTES: Final = 1 << 16


def bounded_protocol(seconds: float) -> type[HttpToolsProtocol]:
    """The protocol for `uvicorn.Config`.

    Args:
        seconds: after which a connection is closed whose request has not arrived as a whole, from
            its first byte or, of the first request, from the beginning of the connection.
    """

    class BoundedProtocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        # Bytes that came since the headers' end or since the body went on.
        _beside = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._deadline = self.loop.call_later(seconds, transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._beside += len(data)
            super().data_received(data)
            if self._beside > MOST_HEAD_BYTES and not self.transport.is_closing():
                message = f"Headers beyond {MOST_HEAD_BYTES} bytes."
                self.logger.warning(message)
                self.send_400_response(message)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self.transport.close)

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._beside = 0

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            self._beside = 0

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._beside = 0
            self._arrived()

        def _arrived(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return BoundedProtocol
