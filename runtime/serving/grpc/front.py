"""What listens for gRPC's clients: their bytes go to gRPC's own server by way of `Headers`.

gRPC's server listens on a socket that only this user can reach. A client's connection is one
connection to it, answers come back as they are, and neither side is read while the other one does
not take what was read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.grpc.headers import Answers, BrokenError, Headers

_LOG = logging.getLogger("hhdeploy.serve.grpc")


class Front:
    """Listens until it is closed.

    Attributes:
        port: it listens on.
    """

    def __init__(self, inner: Path, refused: Callable[[RequestError], None]) -> None:
        """``inner``: socket of gRPC's own server; ``refused``: is told what that refuses."""
        self.port = 0
        self.inner, self.refused = inner, refused
        self._servers: list[asyncio.Server] = []
        self._clients: set[_Client] = set()
        self._empty = asyncio.Event()

    async def listen(self, sockets: list[socket.socket], tls: ssl.SSLContext | None) -> None:
        """Take connections of these sockets, which are closed with it; ``tls``: encrypted ones."""
        loop = asyncio.get_running_loop()
        self.port = sockets[0].getsockname()[1]
        for each in sockets:
            server = await loop.create_server(lambda: _Client(self), sock=each, ssl=tls)
            self._servers.append(server)

    def close(self) -> None:
        """Take no more connections; those that there are go on."""
        for server in self._servers:
            server.close()

    async def drain(self, seconds: float) -> None:
        """Wait until there are no connections: each ends once its answers are sent.

        Args:
            seconds: at most.
        """
        if self._clients:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)

    def abort(self) -> None:
        """End every connection."""
        for client in list(self._clients):
            client.end()

    def end_of(self, peer: str) -> None:
        """End the connection of a client, by its address as `Headers` tells it."""
        for client in [each for each in self._clients if each.peer == peer]:
            client.end()

    def join(self, client: _Client) -> None:
        """One more."""
        self._clients.add(client)
        self._empty.clear()

    def leave(self, client: _Client) -> None:
        """It is gone."""
        self._clients.discard(client)
        if not self._clients:
            self._empty.set()


class _Half(asyncio.Protocol):
    """One of the two connections; what it cannot send yet, the other one does not read."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.other: _Half | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.transport.resume_reading()


class _Client(_Half):
    """The connection of a client."""

    def __init__(self, front: Front) -> None:
        super().__init__()
        self._front = front
        self.peer = ""
        self._headers: Headers | None = None
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._front.join(self)
        self.peer = _address(transport.get_extra_info("peername"))
        self._headers = Headers(self.peer)
        self.transport.pause_reading()
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop, path = asyncio.get_running_loop(), str(self._front.inner)
        refused = self._front.refused
        try:
            _, self.other = await loop.create_unix_connection(lambda: _Server(self, refused), path)
        except OSError as error:
            _LOG.error("gRPC's own server does not answer", extra={"error": str(error)})
            self.transport.abort()
            return
        if self.transport.is_closing():  # it left meanwhile
            self.other.transport.abort()
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        assert self._headers is not None and self.other is not None
        try:
            readable = self._headers.feed(data)
        except BrokenError as error:
            _LOG.debug("connection refused", extra={"reason": str(error)})
            self.end()
            return
        if readable:
            self.other.transport.write(readable)

    def connection_lost(self, exc: Exception | None) -> None:
        self._front.leave(self)
        if self.other is not None:
            self.other.transport.abort()

    def end(self) -> None:
        """Close both connections at once."""
        self.transport.abort()


class _Server(_Half):
    """The connection to gRPC's own server on behalf of a client."""

    def __init__(self, client: _Client, refused: Callable[[RequestError], None]) -> None:
        super().__init__()
        self.other = client
        self._answers = Answers(refused)

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        self._answers.feed(data)
        self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        assert self.other is not None
        if exc is not None:  # e.g. it has answered and closed, and the client still talks
            self.other.transport.write(_unread(self.transport))
        self.other.transport.close()  # once it has sent what there is


def _unread(transport: asyncio.Transport) -> bytes:
    """What has arrived on a connection that broke off while it was written to."""
    number, found = transport.get_extra_info("socket").fileno(), b""
    with contextlib.suppress(OSError):  # nothing more
        while piece := os.read(number, 1 << 16):
            found += piece
    return found


def _address(peer: Any) -> str:
    if not isinstance(peer, tuple) or len(peer) < 2:
        return ""
    return f"[{peer[0]}]:{peer[1]}" if ":" in str(peer[0]) else f"{peer[0]}:{peer[1]}"
