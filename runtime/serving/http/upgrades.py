"""Requests that offer to go on in another protocol, as Java's HttpClient does with each first one.

A server may ignore the offer (RFC 9110, 7.8), and this one does. httptools ends such a request with
its head: its body would be lost, or what arrives of it later be read as another request.
"""

from __future__ import annotations

import contextlib
from array import array

from httptools import HttpParserInvalidMethodError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER = b"upgrade"


class RequestParser(HttpRequestParser):
    """httptools' parser, to which no request offers anything: one that does is read once more.

    The protocol hears the head of one twice, and is to pass over what ends while `should_upgrade`.
    """

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        """``protocol``: hears what is read, and keeps the head of the request that is read now."""
        self._protocol = protocol
        self._begin()

    def _begin(self) -> None:
        super().__init__(self._protocol)  # also of one that has read before: it is as a new one
        with contextlib.suppress(AttributeError):  # httptools before 0.6.3
            # As uvicorn has it: requests that a client sent before it was told of the end.
            self.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed_data(self, data: bytes | bytearray | memoryview | array[int]) -> None:
        """Read what came; raises `HttpParserError` where it is no HTTP, or CONNECT."""
        rest = memoryview(data)  # thousands of requests may be in it
        while True:
            try:
                super().feed_data(rest)
                return
            except HttpParserUpgrade as stopped:
                rest = rest[stopped.args[0] :]
            if self.get_method() == b"CONNECT":  # what follows has no end that could be known
                raise HttpParserInvalidMethodError("CONNECT is for proxies.")
            head = self._head_without_offer()
            self._begin()  # of a connection that is to be closed this one would read no more
            super().feed_data(head)

    def _head_without_offer(self) -> bytes:
        version = self.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.get_method(), self._protocol.url, version)]
        lines += [b"%b: %b" % each for each in self._protocol.headers if each[0] != _OFFER]
        return b"\r\n".join((*lines, b"", b""))
