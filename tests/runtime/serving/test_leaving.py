"""Answers that are not read: what a server holds of them, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from uvicorn import Config
from uvicorn.server import ServerState

from hhdeploy.runtime.serving.access.tls import Tls
from hhdeploy.runtime.serving.errors import BusyError
from hhdeploy.runtime.serving.http import bodies as limits
from hhdeploy.runtime.serving.http.arrival import bounded_protocol
from hhdeploy.runtime.serving.http.bodies import Bodies
from hhdeploy.runtime.serving.http.leaving import send_answer
from tests.runtime.serving.certificates import make_certificate
from tests.runtime.serving.fleets import PATIENCE

# More than a connection on this machine takes that nobody reads, and with a small buffer.
LARGE = bytes(range(256)) * (8 << 12)
ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def served(
    bodies: Bodies, patience: float, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server that answers `LARGE`, or 429: its port."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send_answer(Response(LARGE), scope, receive, send, bodies.leaving)
        except BusyError:
            await Response(b"", 429)(scope, receive, send)

    protocol = bounded_protocol(patience, 100, lambda error: None, lambda: False)
    config = Config(app, http=protocol, log_config=None, lifespan="off")
    config.load()
    factory = partial(config.http_protocol_class, config, ServerState(), {})
    loop = asyncio.get_running_loop()
    server = await loop.create_server(factory, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def asked(
    port: int, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that has asked, and reads as the test does."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
    name = "localhost" if tls is not None else None
    reader, writer = await asyncio.open_connection(
        sock=own, limit=1 << 19, ssl=tls, server_hostname=name
    )
    writer.write(ASK)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()  # type: ignore[attr-defined]


async def until_held(bodies: Bodies, count: int) -> None:
    while bodies._held != count * len(LARGE):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("secure", [False, True])
def test_who_reads_nothing_is_not_waited_for(tmp_path: Path, secure):
    """Who reads slowly is, and the next answer on the connection is whole as well."""
    cert, key = make_certificate(tmp_path)
    client = ssl.create_default_context(cafile=str(cert)) if secure else None

    async def scene() -> None:
        bodies = Bodies(1 << 30)
        context = Tls(cert, key).http if secure else None
        async with (
            served(bodies, 0.3, context) as port,
            asked(port, client),
            asked(port, client) as (reader, writer),
        ):
            await until_held(bodies, 2)
            for _ in range(2):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                found = b""
                while len(found) < len(LARGE):
                    found += await reader.read(len(LARGE) - len(found))
                    await asyncio.sleep(0.01)
                assert found == LARGE
                writer.write(ASK)
            await until_held(bodies, 0)

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_answers_that_nobody_reads_make_room_for_others(monkeypatch):
    monkeypatch.setattr(limits, "SLOW_SECONDS", PATIENCE)

    async def scene() -> None:
        bodies = Bodies(len(LARGE) * 3 // 2)
        async with served(bodies, PATIENCE) as port, asked(port) as (unread, _):
            await until_held(bodies, 1)
            async with asked(port) as (reader, _):
                assert (await reader.readline()).split()[1] == b"429"
            monkeypatch.setattr(limits, "SLOW_SECONDS", 0.0)
            async with asked(port) as (reader, _):
                assert (await reader.readline()).split()[1] == b"200"
                assert bodies._held == len(LARGE)
                found = 0
                while piece := await unread.read(1 << 20):
                    found += len(piece)
                assert found < len(LARGE)
                await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(len(LARGE)) == LARGE
            await until_held(bodies, 0)

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (b"hello\r\n\r\n", "Invalid method"),
        (b"GET / HTTP/1.1\r\na b: c\r\n\r\n", "header"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "Content-Length"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk size"),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", "CONNECT is for proxies."),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", "its target a path below 64 KiB."),
        (b"GET http://x HTTP/1.1\r\n\r\n", "its target a path below 64 KiB."),
    ],
)
def test_what_is_no_request_is_told_why_in_json(asked, said):
    async def scene() -> bytes:
        async with served(Bodies(1 << 20), PATIENCE) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(asked)
            answer = await reader.read()
            writer.close()
            return answer

    head, _, body = asyncio.run(asyncio.wait_for(scene(), PATIENCE)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    assert b"content-length: %d" % len(body) in head and b"connection: close" in head
    text = json.loads(body)["error"]
    assert text.startswith("expected a request of HTTP/1.1") and said in text
    assert not text.endswith("..")
