"""Bodies to messages: what is large in a process of its own, see `processes.parsing`.

A body of few bytes may be many once it is decompressed, which takes the same time from those that
are answered: so the process decompresses, too.
"""

from __future__ import annotations

from typing import Any, Final

from hhdeploy.runtime.serving.errors import TooLargeError
from hhdeploy.runtime.serving.http.codec import (
    Body,
    decompressed,
    json_length,
    read_object,
    read_request,
)
from hhdeploy.runtime.serving.messages import InferRequest
from hhdeploy.runtime.serving.processes.parsing import Parser

# Of JSON, and of what was compressed; read at once: a few milliseconds.
SMALL: Final = 256 << 10


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
