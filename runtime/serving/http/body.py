"""Bodies of HTTP requests: read within limits, decompressed, counted as long as they are held."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from hhdeploy.runtime.serving.errors import BusyError, TooLargeError
from hhdeploy.runtime.serving.http.codec import decompressed


class Bodies:
    """The bodies that one server holds. Many small requests may be large together."""

    def __init__(self, most: int) -> None:
        """``most``: bytes of all bodies at the same time."""
        self._most = most
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        """The whole body, decompressed; refused as soon as it is longer than ``limit``.

        Raises:
            TooLargeError: it is.
            BusyError: all bodies together are beyond the server's limit.
            RequestError: see `decompressed`.
        """
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:18]) > limit:
            raise TooLargeError(f"the body is {declared[:18]} bytes, at most {limit} are taken.")
        chunks: list[bytes] = []
        size = held = 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise TooLargeError(f"the body is beyond {limit} bytes.")
                held += self._take(len(chunk))
                chunks.append(chunk)
            body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.clear()
            content = decompressed(body, request.headers.get("content-encoding", ""), limit)
            if content is not body:
                held += self._take(len(content))
            yield content
        finally:
            self._held -= held

    def _take(self, size: int) -> int:
        if self._held + size > self._most:
            raise BusyError(
                f"the bodies of all requests are {self._held} bytes, at most {self._most} are "
                "taken. Try again later."
            )
        self._held += size
        return size
